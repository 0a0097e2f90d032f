#include "fleet.h"

#include <algorithm>
#include <utility>

namespace aseer {
namespace {

// The room of an idle instance: one request may have all of it.
constexpr int64_t kIdle = int64_t{1} << 40;
// Ids are dense. This many rows take 0.1 GB; a larger id is not meant.
constexpr size_t kMaxInstances = size_t{1} << 20;

}  // namespace

int64_t KvShape::BlocksFor(int64_t num_tokens) const {
  const int64_t written = num_tokens + num_lookahead_tokens;
  if (groups.empty()) return (written + block_size - 1) / block_size;
  int64_t blocks = 0;
  for (const KvGroup& group : groups) {
    const int64_t needed = (written + group.block_size - 1) / group.block_size;
    const bool is_bounded = group.max_blocks >= 0;
    blocks += is_bounded ? std::min(needed, group.max_blocks) : needed;
    blocks += group.num_extra_blocks;
  }
  return blocks;
}

int64_t KvShape::MostTokens(int64_t num_blocks) const {
  if (groups.empty()) return num_blocks * block_size;
  if (num_blocks >= kIdle) return kIdle;
  if (BlocksFor(0) > num_blocks) return 0;
  // So many tokens fit; what is above does not.
  int64_t fits = 0;
  int64_t above = kIdle;
  for (const KvGroup& group : groups) {
    if (group.max_blocks < 0) above = (num_blocks + 1) * group.block_size;
  }
  if (BlocksFor(above) <= num_blocks) return kIdle;  // no group grows without end
  while (above - fits > 1) {
    const int64_t middle = fits + (above - fits) / 2;
    (BlocksFor(middle) <= num_blocks ? fits : above) = middle;
  }
  return fits;
}

const Capacity::Instance& Capacity::At(size_t instance) const {
  if (instance >= instances_.size() || !instances_[instance].is_known) {
    throw std::out_of_range("no such instance was added");
  }
  return instances_[instance];
}

std::vector<int64_t> Capacity::AliveIds() const {
  std::vector<int64_t> ids;
  for (size_t i = 0; i < instances_.size(); ++i) {
    if (instances_[i].is_alive) ids.push_back(static_cast<int64_t>(i));
  }
  return ids;
}

void Capacity::Add(size_t instance, int64_t pool, int64_t node, int64_t num_kv_blocks,
                   int64_t max_num_seqs, KvShape shape) {
  Require(instance < kMaxInstances, "an instance's id is below 1,048,576");
  Require(shape.block_size >= 1, "a block holds at least one token");
  Require(num_kv_blocks >= 0 && shape.num_lookahead_tokens >= 0 && max_num_seqs >= 0,
          "an instance's limits are not negative");
  for (const KvGroup& group : shape.groups) {
    Require(group.block_size >= 1, "a block of a group holds at least one token");
    Require(group.max_blocks >= -1 && group.num_extra_blocks >= 0,
            "a group's blocks are not negative");
  }
  if (instance >= instances_.size()) {
    instances_.resize(instance + 1);
    room_.resize(instance + 1);
    load_.resize(instance + 1);
    node_.resize(instance + 1);
    selected_.resize(instance + 1);
  }
  Require(!instances_[instance].is_alive, "it is up already");
  is_uniform_ = !is_any_known_ || (is_uniform_ && shape == shape_);
  is_any_known_ = true;
  shape_ = shape;
  instances_[instance] = {.is_known = true,
                          .is_alive = true,
                          .pool = pool,
                          .node = node,
                          .num_kv_blocks = num_kv_blocks,
                          .max_num_seqs = max_num_seqs,
                          .free = num_kv_blocks,
                          .shape = std::move(shape)};
  node_[instance] = node;
  ++num_alive_;
  Update(instance);
}

void Capacity::Remove(size_t instance) {
  Instance& gone = At(instance);
  num_alive_ -= gone.is_alive;
  gone.is_alive = false;
  gone.max_num_seqs = 0;
  selected_[instance] = 0;
  Update(instance);
}

int64_t Capacity::Reserve(size_t instance, int64_t num_tokens,
                          int64_t num_shared_blocks) {
  Instance& i = At(instance);
  int64_t blocks =
      num_tokens ? std::min(i.shape.BlocksFor(num_tokens), i.num_kv_blocks) : 0;
  blocks = std::max(int64_t{0}, blocks - num_shared_blocks);
  if (blocks > i.free) throw std::logic_error("reservation beyond capacity");
  i.free -= blocks;
  ++i.running;
  Update(instance);
  return blocks;
}

void Capacity::Release(size_t instance, int64_t num_blocks) {
  Instance& i = At(instance);
  if (!i.is_alive) return;
  i.free += num_blocks;
  --i.running;
  Update(instance);
}

void Capacity::Update(size_t instance) {
  const Instance& i = instances_[instance];
  int64_t room = 0;
  if (i.running < i.max_num_seqs && static_cast<int64_t>(instance) != held_) {
    room = i.running ? i.free : kIdle;
  }
  if (most_room_ >= 0 && room >= most_room_) {
    most_room_ = room;
  } else if (room_[instance] == most_room_) {
    most_room_ = -1;
  }
  room_[instance] = room;
  load_[instance] = i.running * (int64_t{1} << 32) - i.free;
}

int64_t Capacity::MostRoom() {
  if (most_room_ < 0) most_room_ = std::ranges::max(room_);
  return most_room_;
}

int64_t Capacity::MostTokens() {
  if (is_uniform_) return MostRoom() ? shape_.MostTokens(MostRoom()) : 0;
  int64_t most = 0;
  for (size_t i = 0; i < instances_.size(); ++i) {
    if (room_[i]) most = std::max(most, instances_[i].shape.MostTokens(room_[i]));
  }
  return most;
}

bool Capacity::Select(int64_t num_tokens) {
  bool is_any = false;
  if (!is_uniform_) {
    for (size_t i = 0; i < instances_.size(); ++i) {
      selected_[i] = room_[i] >= instances_[i].shape.BlocksFor(num_tokens);
      is_any |= selected_[i] != 0;
    }
    return is_any;
  }
  const int64_t blocks = shape_.BlocksFor(num_tokens);
  if (blocks > MostRoom()) {
    std::ranges::fill(selected_, 0);
    return false;
  }
  for (size_t i = 0; i < room_.size(); ++i) selected_[i] = room_[i] >= blocks;
  return true;
}

bool Capacity::SelectAlive() {
  for (size_t i = 0; i < instances_.size(); ++i) selected_[i] = instances_[i].is_alive;
  return num_alive_ > 0;
}

bool Capacity::Fits(size_t instance, int64_t num_tokens,
                    int64_t num_shared_blocks) const {
  const Instance& i = At(instance);
  return room_[instance] >= i.shape.BlocksFor(num_tokens) - num_shared_blocks;
}

bool Capacity::IsSelected(size_t instance) const {
  At(instance);
  return selected_[instance] != 0;
}

int64_t Capacity::LeastLoaded(const std::vector<int64_t>& nodes, int64_t slack) const {
  int64_t least = -1;
  for (size_t i = 0; i < selected_.size(); ++i) {
    if (selected_[i] && (least < 0 || load_[i] < load_[least])) {
      least = static_cast<int64_t>(i);
    }
  }
  Require(least >= 0, "the selection is empty");
  if (nodes.empty()) return least;
  int64_t near = -1;
  for (size_t i = 0; i < selected_.size(); ++i) {
    if (!selected_[i] || (near >= 0 && load_[i] >= load_[near])) continue;
    if (std::ranges::find(nodes, node_[i]) != nodes.end()) {
      near = static_cast<int64_t>(i);
    }
  }
  const bool is_near =
      near >= 0 && instances_[near].running - instances_[least].running <= slack;
  return is_near ? near : least;
}

int64_t Capacity::LeastLoadedOf(int64_t pool, int64_t node) const {
  int64_t least = -1;
  for (size_t i = 0; i < selected_.size(); ++i) {
    if (!selected_[i] || node_[i] != node) continue;
    if (instances_[i].pool == pool && (least < 0 || load_[i] < load_[least])) {
      least = static_cast<int64_t>(i);
    }
  }
  return least;
}

void Capacity::HoldNone() {
  const int64_t held = held_;
  held_ = -1;
  if (held >= 0) Update(static_cast<size_t>(held));
}

bool Capacity::HoldFreest() {
  if (held_ >= 0 || room_.empty()) return false;
  held_ = std::ranges::max_element(room_) - room_.begin();
  Update(static_cast<size_t>(held_));
  return true;
}

}  // namespace aseer
