#include "fleet.h"

#include <algorithm>

namespace aseer {
namespace {

// The room of an idle instance: one request may have all of it.
constexpr int64_t kIdle = int64_t{1} << 40;
// Ids are dense. This many rows take 0.1 GB; a larger id is not meant.
constexpr size_t kMaxInstances = size_t{1} << 20;

}  // namespace

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

void Capacity::Add(size_t instance, int64_t pool, int64_t num_kv_blocks,
                   int64_t block_size, int64_t num_lookahead_tokens,
                   int64_t max_num_seqs) {
  Require(instance < kMaxInstances, "an instance's id is below 1,048,576");
  Require(block_size >= 1, "a block holds at least one token");
  Require(num_kv_blocks >= 0 && num_lookahead_tokens >= 0 && max_num_seqs >= 0,
          "an instance's limits are not negative");
  if (instance >= instances_.size()) {
    instances_.resize(instance + 1);
    room_.resize(instance + 1);
    load_.resize(instance + 1);
    selected_.resize(instance + 1);
  }
  Require(!instances_[instance].is_alive, "it is up already");
  const bool is_same =
      block_size == block_size_ && num_lookahead_tokens == num_lookahead_tokens_;
  is_uniform_ = !is_any_known_ || (is_uniform_ && is_same);
  is_any_known_ = true;
  block_size_ = block_size;
  num_lookahead_tokens_ = num_lookahead_tokens;
  most_block_size_ = std::max(most_block_size_, block_size);
  instances_[instance] = {.is_known = true,
                          .is_alive = true,
                          .pool = pool,
                          .num_kv_blocks = num_kv_blocks,
                          .block_size = block_size,
                          .num_lookahead_tokens = num_lookahead_tokens,
                          .max_num_seqs = max_num_seqs,
                          .free = num_kv_blocks};
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
  int64_t blocks = num_tokens ? std::min(i.BlocksFor(num_tokens), i.num_kv_blocks) : 0;
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

int64_t Capacity::MostTokens() {
  if (most_room_ < 0) most_room_ = std::ranges::max(room_);
  return most_room_ * most_block_size_;
}

bool Capacity::Select(int64_t num_tokens) {
  bool is_any = false;
  if (!is_uniform_) {
    for (size_t i = 0; i < instances_.size(); ++i) {
      selected_[i] = room_[i] >= instances_[i].BlocksFor(num_tokens);
      is_any |= selected_[i] != 0;
    }
    return is_any;
  }
  const int64_t blocks =
      (num_tokens + num_lookahead_tokens_ + block_size_ - 1) / block_size_;
  if (blocks * block_size_ > MostTokens()) {
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

bool Capacity::Fits(size_t instance, int64_t num_tokens) const {
  const Instance& i = At(instance);
  return room_[instance] >= i.BlocksFor(num_tokens);
}

bool Capacity::IsSelected(size_t instance) const {
  At(instance);
  return selected_[instance] != 0;
}

int64_t Capacity::LeastLoaded() const {
  int64_t least = -1;
  for (size_t i = 0; i < selected_.size(); ++i) {
    if (selected_[i] && (least < 0 || load_[i] < load_[least])) {
      least = static_cast<int64_t>(i);
    }
  }
  Require(least >= 0, "the selection is empty");
  return least;
}

int64_t Capacity::LeastLoadedOf(int64_t pool) const {
  int64_t least = -1;
  for (size_t i = 0; i < selected_.size(); ++i) {
    const bool is_candidate = selected_[i] && instances_[i].pool == pool;
    if (is_candidate && (least < 0 || load_[i] < load_[least])) {
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
