// The capacity of the instances: see aseer/fleet.py.
#pragma once

#include <cstdint>
#include <vector>

#include "slots.h"

namespace aseer {

class Capacity {
 public:
  int64_t Size() const { return num_alive_; }
  std::vector<int64_t> AliveIds() const;
  int64_t BlockSize() const { return block_size_; }
  int64_t NumLookaheadTokens() const { return num_lookahead_tokens_; }

  // Pool: whose instances share KV; -1 = none.
  void Add(size_t instance, int64_t pool, int64_t num_kv_blocks, int64_t block_size,
           int64_t num_lookahead_tokens, int64_t max_num_seqs);
  void Remove(size_t instance);

  int64_t Reserve(size_t instance, int64_t num_tokens, int64_t num_shared_blocks);
  void Release(size_t instance, int64_t num_blocks);
  int64_t NumRunning(size_t instance) const { return At(instance).running; }
  int64_t NumFreeBlocks(size_t instance) const { return At(instance).free; }
  int64_t PoolOf(size_t instance) const { return At(instance).pool; }
  void SetPool(size_t instance, int64_t pool) { At(instance).pool = pool; }

  int64_t MostTokens();
  bool Select(int64_t num_tokens);
  bool SelectAlive();
  bool Fits(size_t instance, int64_t num_tokens) const;
  bool IsSelected(size_t instance) const;
  int64_t LeastLoaded() const;
  int64_t LeastLoadedOf(int64_t pool) const;  // -1: no candidate is of that pool
  void HoldNone();
  bool HoldFreest();

 private:
  struct Instance {
    bool is_known = false;
    bool is_alive = false;
    int64_t pool = -1;
    int64_t num_kv_blocks = 0;
    int64_t block_size = 1;
    int64_t num_lookahead_tokens = 0;
    int64_t max_num_seqs = 0;
    int64_t free = 0;
    int64_t running = 0;

    int64_t BlocksFor(int64_t num_tokens) const {
      return (num_tokens + num_lookahead_tokens + block_size - 1) / block_size;
    }
  };

  const Instance& At(size_t instance) const;
  Instance& At(size_t instance) {
    return const_cast<Instance&>(static_cast<const Capacity&>(*this).At(instance));
  }
  // Recomputes an instance's room and load after a change of it.
  void Update(size_t instance);

  std::vector<Instance> instances_;
  int64_t num_alive_ = 0;
  // What a decision compares, an entry an instance.
  std::vector<int64_t> room_;  // blocks a further request may take; 0 = none may come
  std::vector<int64_t> load_;  // orders by chunks running, then by free KV
  std::vector<uint8_t> selected_;
  int64_t held_ = -1;
  int64_t most_room_ = 0;  // of all instances; -1 = to be computed
  int64_t most_block_size_ = 1;
  bool is_any_known_ = false;
  bool is_uniform_ = true;  // all have the same block size and lookahead
  int64_t block_size_ = 1;
  int64_t num_lookahead_tokens_ = 0;
};

}  // namespace aseer
