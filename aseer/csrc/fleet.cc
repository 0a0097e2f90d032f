#include "fleet.h"

#include <algorithm>

namespace aseer {
namespace {

// The room of an idle instance: one request may have all of it.
constexpr int64_t kIdle = int64_t{1} << 40;

int64_t Number(const nb::object& info, const char* name) {
  return nb::cast<int64_t>(info.attr(name));
}

}  // namespace

int64_t Fleet::Size() const {
  return std::ranges::count_if(instances_, [](const auto& i) { return i.is_alive; });
}

std::vector<int64_t> Fleet::AliveIds() const {
  std::vector<int64_t> ids;
  for (size_t i = 0; i < instances_.size(); ++i) {
    if (instances_[i].is_alive) ids.push_back(static_cast<int64_t>(i));
  }
  return ids;
}

void Fleet::Add(const nb::object& info) {
  const auto id = nb::cast<size_t>(info.attr("instance_id"));
  if (id < instances_.size() && instances_[id].is_alive) {
    const nb::str message = nb::str("instance {} is up already").format(id);
    throw nb::value_error(message.c_str());
  }
  Instance added{.info = info,
                 .is_alive = true,
                 .num_kv_blocks = Number(info, "num_kv_blocks"),
                 .block_size = Number(info, "block_size"),
                 .num_lookahead_tokens = Number(info, "num_lookahead_tokens"),
                 .max_num_seqs = Number(info, "max_num_seqs")};
  added.free = added.num_kv_blocks;
  const bool is_first = std::ranges::none_of(
      instances_, [](const Instance& i) { return i.info.is_valid(); });
  const bool is_same = added.block_size == block_size_ &&
                       added.num_lookahead_tokens == num_lookahead_tokens_;
  is_uniform_ = is_first || (is_uniform_ && is_same);
  block_size_ = added.block_size;
  num_lookahead_tokens_ = added.num_lookahead_tokens;
  most_block_size_ = std::max(most_block_size_, added.block_size);
  if (id >= instances_.size()) {
    instances_.resize(id + 1);
    room_.resize(id + 1);
    load_.resize(id + 1);
    selected_.resize(id + 1);
  }
  instances_[id] = std::move(added);
  Update(id);
}

void Fleet::Remove(size_t instance) {
  Instance& gone = instances_.at(instance);
  gone.is_alive = false;
  gone.max_num_seqs = 0;
  selected_[instance] = 0;
  Update(instance);
}

int64_t Fleet::Reserve(size_t instance, int64_t num_tokens, int64_t num_shared_blocks) {
  Instance& i = instances_.at(instance);
  int64_t blocks = num_tokens ? std::min(i.BlocksFor(num_tokens), i.num_kv_blocks) : 0;
  blocks = std::max(int64_t{0}, blocks - num_shared_blocks);
  if (blocks > i.free) {
    PyErr_SetString(PyExc_AssertionError, "reservation beyond capacity");
    throw nb::python_error();
  }
  i.free -= blocks;
  ++i.running;
  Update(instance);
  return blocks;
}

void Fleet::Release(size_t instance, int64_t num_blocks) {
  Instance& i = instances_.at(instance);
  if (!i.is_alive) return;
  i.free += num_blocks;
  --i.running;
  Update(instance);
}

void Fleet::Update(size_t instance) {
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
  load_[instance] = (i.running << 32) - i.free;
}

int64_t Fleet::MostTokens() {
  if (most_room_ < 0) most_room_ = std::ranges::max(room_);
  return most_room_ * most_block_size_;
}

bool Fleet::Select(int64_t num_tokens) {
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

bool Fleet::SelectAlive() {
  for (size_t i = 0; i < instances_.size(); ++i) selected_[i] = instances_[i].is_alive;
  return Size() > 0;
}

bool Fleet::Fits(size_t instance, int64_t num_tokens) const {
  return room_.at(instance) >= instances_[instance].BlocksFor(num_tokens);
}

int64_t Fleet::LeastLoaded() const {
  int64_t least = -1;
  for (size_t i = 0; i < selected_.size(); ++i) {
    if (selected_[i] && (least < 0 || load_[i] < load_[least])) {
      least = static_cast<int64_t>(i);
    }
  }
  if (least < 0) throw nb::value_error("the selection is empty");
  return least;
}

void Fleet::HoldNone() {
  const int64_t held = held_;
  held_ = -1;
  if (held >= 0) Update(static_cast<size_t>(held));
}

bool Fleet::HoldFreest() {
  if (held_ >= 0 || room_.empty()) return false;
  held_ = std::ranges::max_element(room_) - room_.begin();
  Update(static_cast<size_t>(held_));
  return true;
}

}  // namespace aseer
