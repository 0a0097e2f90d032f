#include "residency.h"

#include <algorithm>

namespace aseer {

namespace {

double CheckedPrice(double price) {
  Require(price >= 0.0 && price <= 1.0, "a price of moving lies between 0 and 1");
  return price;
}

int64_t Less(int64_t num_tokens, double price) {
  return static_cast<int64_t>(static_cast<double>(num_tokens) * (1.0 - price));
}

}  // namespace

void PrefixCaches::SetMovePrice(double price) { move_price_ = CheckedPrice(price); }

void PrefixCaches::SetNodePrice(double price) { node_price_ = CheckedPrice(price); }

void PrefixCaches::SetGranularity(int64_t granularity) {
  Require(granularity >= 0, "a granularity is not negative");
  granularity_ = granularity;
}

void PrefixCaches::AddInstance(int64_t instance, int64_t num_blocks, int64_t block_size,
                               int64_t pool, int64_t node) {
  Require(block_size >= 1, "a block holds at least one token");
  DropInstance(instance);
  caches_.emplace(instance, Cache{num_blocks, block_size, pool, node});
}

void PrefixCaches::SetPool(int64_t instance, int64_t pool) {
  const auto found = caches_.find(instance);
  Require(found != caches_.end(), "no such instance is up");
  found->second.pool = pool;
}

void PrefixCaches::DropInstance(int64_t instance) {
  const auto found = caches_.find(instance);
  if (found == caches_.end()) return;
  Cache& cache = found->second;
  while (!cache.cached.empty()) Drop(requests_[cache.cached.front()], instance, cache);
  caches_.erase(found);
}

void PrefixCaches::Close(Handle request) {
  Require(requests_.IsOpen(request), "the request is not known");
  for (const Holding& held : requests_[request].held) {
    Cache& cache = caches_.at(held.instance);
    cache.num_cached -= held.num_blocks;
    cache.cached.erase(held.at);
  }
  requests_.Close(request);
}

PrefixCaches::Held PrefixCaches::Holders(Handle handle) const {
  Require(requests_.IsOpen(handle), "the request is not known");
  const Request& request = requests_[handle];
  Held all;
  if (request.num_pooled) {
    all.pool = request.pool;
    all.node = request.node;
    all.num_pooled = Less(request.num_pooled, move_price_);
    all.num_far = Less(request.num_pooled, node_price_);
  }
  for (const Holding& held : request.held) {
    const Cache& cache = caches_.at(held.instance);
    const int64_t tokens = held.num_blocks * cache.block_size;
    int64_t at_least = 0;
    if (request.num_pooled && cache.pool == request.pool) {
      at_least = cache.node == request.node ? all.num_pooled : all.num_far;
    }
    if (tokens > at_least) all.tokens.emplace_back(held.instance, tokens);
  }
  return all;
}

void PrefixCaches::Reserve(int64_t instance, Handle request, int64_t num_blocks) {
  const auto found = caches_.find(instance);
  Require(found != caches_.end(), "no such instance is up");
  Require(request < 0 || requests_.IsOpen(request), "the request is not known");
  Cache& cache = found->second;
  cache.reserved += num_blocks;
  if (request >= 0) Drop(requests_[request], instance, cache);
  Evict(instance, cache);
}

void PrefixCaches::Release(int64_t instance, Handle request, int64_t num_blocks,
                           int64_t num_tokens) {
  Require(requests_.IsOpen(request), "the request is not known");
  const auto found = caches_.find(instance);
  if (found == caches_.end()) return;
  Cache& cache = found->second;
  cache.reserved -= num_blocks;
  Request& released = requests_[request];
  if (const int64_t num_full = num_tokens / cache.block_size) {
    Drop(released, instance, cache);
    cache.cached.push_back(request);
    cache.num_cached += num_full;
    released.held.push_back({instance, num_full, std::prev(cache.cached.end())});
  }
  const bool is_pooled = granularity_ > 0 && cache.pool >= 0;
  if (const int64_t num_pooled =
          is_pooled ? num_tokens / granularity_ * granularity_ : 0) {
    released.pool = cache.pool;
    released.node = cache.node;
    released.num_pooled = num_pooled;
  }
  Evict(instance, cache);
}

void PrefixCaches::Drop(Request& request, int64_t instance, Cache& cache) {
  const auto held = std::ranges::find(request.held, instance, &Holding::instance);
  if (held == request.held.end()) return;
  cache.num_cached -= held->num_blocks;
  cache.cached.erase(held->at);
  request.held.erase(held);
}

void PrefixCaches::Evict(int64_t instance, Cache& cache) {
  while (!cache.cached.empty() &&
         cache.num_cached > cache.num_blocks - cache.reserved) {
    Drop(requests_[cache.cached.front()], instance, cache);
  }
}

}  // namespace aseer
