#include "residency.h"

#include <algorithm>

namespace aseer {

void KvResidency::UsePool(int64_t granularity, nb::callable pool_of) {
  granularity_ = granularity;
  pool_of_ = std::move(pool_of);
  members_.clear();
  for (auto& [instance, cache] : caches_) {
    cache.pool = PoolOf(instance);
    members_[cache.pool].push_back(instance);
  }
}

int64_t KvResidency::PoolOf(int64_t instance) const {
  return pool_of_ ? nb::cast<int64_t>((*pool_of_)(instance)) : -1;
}

void KvResidency::AddInstance(int64_t instance, int64_t num_blocks,
                              int64_t block_size) {
  DropInstance(instance);
  const int64_t pool = PoolOf(instance);
  caches_.emplace(instance, Cache{num_blocks, block_size, pool});
  if (pool_of_) members_[pool].push_back(instance);
}

void KvResidency::DropInstance(int64_t instance) {
  const auto found = caches_.find(instance);
  if (found == caches_.end()) return;
  Cache& cache = found->second;
  while (!cache.cached.empty()) {
    Request& request = *cache.cached.front();
    Drop(request, instance, cache);
    EraseIfNowhere(request);
  }
  std::erase(members_[cache.pool], instance);
  caches_.erase(found);
}

nb::dict KvResidency::Holders(nb::handle request_id) const {
  nb::dict holders;
  const auto found = requests_.find(request_id);
  if (found == requests_.end()) return holders;
  const Request& request = found->second;
  int64_t found_there = 0;
  if (request.num_pooled) {
    found_there = static_cast<int64_t>(static_cast<double>(request.num_pooled) *
                                       (1.0 - move_price_));
    const auto members = members_.find(request.pool);
    if (members != members_.end()) {
      for (const int64_t instance : members->second) {
        holders[nb::int_(instance)] = found_there;
      }
    }
  }
  for (const Holding& held : request.held) {
    const Cache& cache = caches_.at(held.instance);
    const bool is_near = request.num_pooled && cache.pool == request.pool;
    const int64_t tokens = held.num_blocks * cache.block_size;
    holders[nb::int_(held.instance)] = std::max(tokens, is_near ? found_there : 0);
  }
  return holders;
}

void KvResidency::Reserve(int64_t instance, nb::handle request_id, int64_t num_blocks) {
  Cache& cache = caches_.at(instance);
  cache.reserved += num_blocks;
  const auto found = requests_.find(request_id);
  if (found != requests_.end()) {
    Drop(found->second, instance, cache);
    EraseIfNowhere(found->second);
  }
  Evict(instance, cache);
}

void KvResidency::Release(int64_t instance, nb::handle request_id, int64_t num_blocks,
                          int64_t num_tokens) {
  const auto found = caches_.find(instance);
  if (found == caches_.end()) return;
  Cache& cache = found->second;
  cache.reserved -= num_blocks;
  const int64_t num_full = num_tokens / cache.block_size;
  const int64_t num_pooled = pool_of_ ? num_tokens / granularity_ * granularity_ : 0;
  if (num_full || num_pooled) {
    Request& request = requests_[request_id];
    if (!request.id.is_valid()) request.id = nb::borrow(request_id);
    if (num_full) {
      Drop(request, instance, cache);
      cache.cached.push_back(&request);
      cache.num_cached += num_full;
      request.held.push_back({instance, num_full, std::prev(cache.cached.end())});
    }
    if (num_pooled) {
      request.pool = cache.pool;
      request.num_pooled = num_pooled;
    }
  }
  Evict(instance, cache);
}

void KvResidency::Forget(nb::handle request_id) {
  const auto found = requests_.find(request_id);
  if (found == requests_.end()) return;
  Request& request = found->second;
  for (const Holding& held : request.held) {
    Cache& cache = caches_.at(held.instance);
    cache.num_cached -= held.num_blocks;
    cache.cached.erase(held.at);
  }
  const nb::object id = std::move(request.id);  // lives until its entry is gone
  requests_.erase(found);
}

void KvResidency::Drop(Request& request, int64_t instance, Cache& cache) {
  const auto held = std::ranges::find(request.held, instance, &Holding::instance);
  if (held == request.held.end()) return;
  cache.num_cached -= held->num_blocks;
  cache.cached.erase(held->at);
  request.held.erase(held);
}

void KvResidency::EraseIfNowhere(Request& request) {
  if (!request.held.empty() || request.num_pooled) return;
  const nb::object id = std::move(request.id);
  requests_.erase(id);
}

void KvResidency::Evict(int64_t instance, Cache& cache) {
  while (!cache.cached.empty() &&
         cache.num_cached > cache.num_blocks - cache.reserved) {
    Request& request = *cache.cached.front();
    Drop(request, instance, cache);
    EraseIfNowhere(request);
  }
}

}  // namespace aseer
