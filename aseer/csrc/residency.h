// Which instances probably hold a waiting request's KV: see aseer/kv/residency.py.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <unordered_map>
#include <vector>

#include "pykey.h"

namespace aseer {

// What loading a token from a pool costs, as a share of computing it.
inline constexpr double kMovePrice = 0.1;

class KvResidency {
 public:
  double MovePrice() const { return move_price_; }
  void SetMovePrice(double price) { move_price_ = price; }

  void UsePool(int64_t granularity, nb::callable pool_of);
  void AddInstance(int64_t instance, int64_t num_blocks, int64_t block_size);
  void DropInstance(int64_t instance);
  nb::dict Holders(nb::handle request_id) const;
  void Reserve(int64_t instance, nb::handle request_id, int64_t num_blocks);
  void Release(int64_t instance, nb::handle request_id, int64_t num_blocks,
               int64_t num_tokens);
  void Forget(nb::handle request_id);

 private:
  struct Request;
  // One instance's prefix cache.
  struct Cache {
    int64_t num_blocks;
    int64_t block_size;
    int64_t pool;
    int64_t reserved = 0;
    int64_t num_cached = 0;
    std::list<Request*> cached{};  // the oldest first
  };
  struct Holding {
    int64_t instance;
    int64_t num_blocks;
    std::list<Request*>::iterator at;
  };
  struct Request {
    nb::object id;
    std::vector<Holding> held;
    int64_t pool = -1;
    int64_t num_pooled = 0;  // tokens
  };

  int64_t PoolOf(int64_t instance) const;
  // The request's blocks there are of no use any more.
  void Drop(Request& request, int64_t instance, Cache& cache);
  void EraseIfNowhere(Request& request);
  void Evict(int64_t instance, Cache& cache);

  std::unordered_map<int64_t, Cache> caches_;
  PyMap<Request> requests_;
  std::optional<nb::callable> pool_of_;
  std::unordered_map<int64_t, std::vector<int64_t>> members_;  // instances by pool
  int64_t granularity_ = 1;
  double move_price_ = kMovePrice;
};

}  // namespace aseer
