// The capacity of the instances: see aseer/core/fleet.py.
#pragma once

#include <cstdint>
#include <vector>

#include "slots.h"

namespace aseer {

// Layers that keep KV alike: see KvGroup in aseer/types.py.
struct KvGroup {
  int64_t block_size;
  int64_t max_blocks;  // -1: no limit
  int64_t num_extra_blocks;

  bool operator==(const KvGroup&) const = default;
};

// What a request's tokens take of an instance's blocks.
struct KvShape {
  int64_t block_size = 1;
  int64_t num_lookahead_tokens = 0;
  std::vector<KvGroup> groups{};  // none: one of block_size that keeps every token

  int64_t BlocksFor(int64_t num_tokens) const;
  // No more tokens than these can fit into so many blocks.
  int64_t MostTokens(int64_t num_blocks) const;
  bool operator==(const KvShape&) const = default;
};

class Capacity {
 public:
  int64_t Size() const { return num_alive_; }
  std::vector<int64_t> AliveIds() const;
  int64_t BlockSize() const { return shape_.block_size; }
  int64_t NumLookaheadTokens() const { return shape_.num_lookahead_tokens; }

  // Pool: whose instances share KV; -1 = none. Node: the host's number.
  void Add(size_t instance, int64_t pool, int64_t node, int64_t num_kv_blocks,
           int64_t max_num_seqs, KvShape shape);
  void Remove(size_t instance);

  int64_t Reserve(size_t instance, int64_t num_tokens, int64_t num_shared_blocks);
  void Release(size_t instance, int64_t num_blocks);
  int64_t NumRunning(size_t instance) const { return At(instance).running; }
  int64_t NumFreeBlocks(size_t instance) const { return At(instance).free; }
  int64_t PoolOf(size_t instance) const { return At(instance).pool; }
  int64_t NodeOf(size_t instance) const { return At(instance).node; }
  void SetPool(size_t instance, int64_t pool) { At(instance).pool = pool; }

  int64_t MostTokens();
  bool Select(int64_t num_tokens);
  bool SelectAlive();
  bool Fits(size_t instance, int64_t num_tokens, int64_t num_shared_blocks) const;
  bool IsSelected(size_t instance) const;
  // One on those nodes, unless all there run more than `slack` requests more than the
  // least loaded of all.
  int64_t LeastLoaded(const std::vector<int64_t>& nodes, int64_t slack) const;
  // -1: no candidate on that node is of that pool.
  int64_t LeastLoadedOf(int64_t pool, int64_t node) const;
  void HoldNone();
  bool HoldFreest();

 private:
  struct Instance {
    bool is_known = false;
    bool is_alive = false;
    int64_t pool = -1;
    int64_t node = 0;
    int64_t num_kv_blocks = 0;
    int64_t max_num_seqs = 0;
    int64_t free = 0;
    int64_t running = 0;
    KvShape shape{};
  };

  const Instance& At(size_t instance) const;
  Instance& At(size_t instance) {
    return const_cast<Instance&>(static_cast<const Capacity&>(*this).At(instance));
  }
  int64_t MostRoom();
  // Recomputes an instance's room and load after a change of it.
  void Update(size_t instance);

  std::vector<Instance> instances_;
  int64_t num_alive_ = 0;
  // What a decision compares, an entry an instance.
  std::vector<int64_t> room_;  // blocks a further request may take; 0 = none may come
  std::vector<int64_t> load_;  // orders by chunks running, then by free KV
  std::vector<int64_t> node_;
  std::vector<uint8_t> selected_;
  int64_t held_ = -1;
  int64_t most_room_ = 0;  // of all instances; -1 = to be computed
  bool is_any_known_ = false;
  bool is_uniform_ = true;  // all have the same shape
  KvShape shape_{};         // of the instance that came last
};

}  // namespace aseer
