// Which instances probably hold a waiting request's KV: see aseer/core/residency.py.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>
#include <vector>

#include "slots.h"

namespace aseer {

// What loading a token from a pool costs, as a share of computing it.
inline constexpr double kMovePrice = 0.1;

class PrefixCaches {
 public:
  struct Held {
    // By instance; of the pool's, only those that hold more than the pool is worth.
    std::vector<std::pair<int64_t, int64_t>> tokens;
    // What every instance of the pool holds, less the price of loading it: those on the
    // node that stored it, and those on others.
    int64_t num_pooled = 0;
    int64_t num_far = 0;
    int64_t pool = -1;
    int64_t node = 0;
  };

  double MovePrice() const { return move_price_; }
  void SetMovePrice(double price);
  double NodePrice() const { return node_price_; }
  void SetNodePrice(double price);

  // Granularity: of what a pool keeps, in tokens; 0 = there is no pool.
  void SetGranularity(int64_t granularity);
  void AddInstance(int64_t instance, int64_t num_blocks, int64_t block_size,
                   int64_t pool, int64_t node);
  void SetPool(int64_t instance, int64_t pool);
  void DropInstance(int64_t instance);

  Handle Open() { return requests_.Open({}); }
  void Close(Handle request);
  Held Holders(Handle request) const;
  // Request -1: one that was not opened, since no chunk of it has ended yet.
  void Reserve(int64_t instance, Handle request, int64_t num_blocks);
  void Release(int64_t instance, Handle request, int64_t num_blocks,
               int64_t num_tokens);

 private:
  // One instance's prefix cache.
  struct Cache {
    int64_t num_blocks;
    int64_t block_size;
    int64_t pool;
    int64_t node;
    int64_t reserved = 0;
    int64_t num_cached = 0;
    std::list<Handle> cached{};  // the oldest first
  };
  struct Holding {
    int64_t instance;
    int64_t num_blocks;
    std::list<Handle>::iterator at;
  };
  struct Request {
    std::vector<Holding> held{};
    int64_t pool = -1;
    int64_t node = 0;        // that stored it
    int64_t num_pooled = 0;  // tokens
  };

  // The request's blocks there are of no use any more.
  void Drop(Request& request, int64_t instance, Cache& cache);
  void Evict(int64_t instance, Cache& cache);

  std::unordered_map<int64_t, Cache> caches_;
  Slots<Request> requests_;
  int64_t granularity_ = 0;
  double move_price_ = kMovePrice;  // within a node
  double node_price_ = kMovePrice;  // between nodes
};

}  // namespace aseer
