#include "forest.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "require.h"

namespace aseer::dgds {

SuffixForest::SuffixForest(uint32_t max_match) : max_match_(max_match) {
  SuffixTree({}, max_match);  // Checks it.
}

const SuffixForest::Group& SuffixForest::group(Handle handle) const {
  const auto found = groups_.find(handle);
  if (found == groups_.end()) throw std::out_of_range("no such group");
  return found->second;
}

const SuffixForest::Request& SuffixForest::request(Handle handle) const {
  const auto i = static_cast<uint32_t>(handle);
  if (i >= requests_.size() || requests_[i].handle != handle) {
    throw std::out_of_range("no such request");
  }
  return requests_[i];
}

SuffixForest::Group& SuffixForest::group(Handle handle) {
  return const_cast<Group&>(std::as_const(*this).group(handle));
}

SuffixForest::Request& SuffixForest::request(Handle handle) {
  return const_cast<Request&>(std::as_const(*this).request(handle));
}

// Valid until the next call.
std::span<SuffixForest::Request*> SuffixForest::Rows(std::span<const Handle> requests) {
  for (const Handle handle : requests) {
    __builtin_prefetch(requests_.data() + static_cast<uint32_t>(handle));
  }
  rows_.resize(requests.size());
  for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = &request(requests[i]);
  for (const Request* row : rows_) {
    __builtin_prefetch(&row->group->tree);
    __builtin_prefetch(row->forecasts.data());
  }
  return rows_;
}

Handle SuffixForest::OpenGroup(std::span<const Token> prompt) {
  const std::lock_guard lock(mutex_);
  groups_.try_emplace(next_handle_, prompt, max_match_);
  return next_handle_++;
}

Handle SuffixForest::OpenRequest(Handle group_handle) {
  const std::lock_guard lock(mutex_);
  Group& owner = group(group_handle);
  const uint32_t slot = owner.tree.Open();
  if (closed_.empty()) {
    closed_.push_back(static_cast<uint32_t>(requests_.size()));
    requests_.emplace_back();
  }
  const uint32_t i = closed_.back();
  closed_.pop_back();
  const Handle handle = (next_handle_++ << 32) | i;
  requests_[i] = {.handle = handle,
                  .group = &owner,
                  .forecasts = {},
                  .end = owner.tree.Cursor(slot),
                  .slot = slot};
  owner.requests.push_back(handle);
  return handle;
}

void SuffixForest::Forget(Handle handle) {
  request(handle) = {};
  closed_.push_back(static_cast<uint32_t>(handle));
  if (closed_.size() < requests_.size()) return;
  requests_ = std::vector<Request>();
  closed_ = std::vector<uint32_t>();
  batches_ = std::vector<uint64_t>();
}

void SuffixForest::CloseGroup(Handle handle) {
  const std::lock_guard lock(mutex_);
  for (const Handle member : group(handle).requests) Forget(member);
  groups_.erase(handle);
}

void SuffixForest::CloseRequests(std::span<const Handle> requests) {
  const std::lock_guard lock(mutex_);
  std::vector<Handle> once(requests.begin(), requests.end());
  std::ranges::sort(once);
  Require(std::ranges::adjacent_find(once) == once.end(), "requests repeat");
  std::unordered_map<Group*, std::vector<uint32_t>> slots;
  for (const Request* row : Rows(requests)) slots[row->group].push_back(row->slot);
  for (const Handle handle : requests) {
    std::erase(request(handle).group->requests, handle);
    Forget(handle);
  }
  for (const auto& [owner, removed] : slots) {
    owner->tree.Remove(removed);  // Its contexts are gone.
    for (const Handle member : owner->requests) {
      Request& row = request(member);
      row.forecasts.clear();
      row.end = owner->tree.Cursor(row.slot);
    }
  }
}

std::vector<int64_t> SuffixForest::Append(std::span<const Handle> requests,
                                          std::span<const Token> tokens,
                                          std::span<const int64_t> offsets,
                                          std::span<const int64_t> starts) {
  RequireOffsets(offsets, requests.size(), tokens.size());
  Require(starts.empty() || starts.size() == requests.size(),
          "starts must be as long as requests");
  Require(std::ranges::all_of(starts, [](int64_t start) { return start >= 0; }),
          "starts must not be negative");
  RequireTokens(tokens);
  const std::lock_guard lock(mutex_);
  const std::span<Request*> rows = Rows(requests);
  for (const Request* row : rows) row->group->tree.PrefetchRequest(row->slot);
  for (const Request* row : rows) row->group->tree.PrefetchEnd(row->slot);
  for (size_t i = 0; i < rows.size(); ++i) {
    const SuffixTree& tree = rows[i]->group->tree;
    const auto known = static_cast<int64_t>(tree.log(rows[i]->slot).size());
    const int64_t skip = starts.empty() ? 0 : known - starts[i];
    const int64_t size = offsets[i + 1] - offsets[i];
    if (skip < 0 || skip >= size) continue;
    AppendRow(*rows[i], tokens.subspan(offsets[i] + skip, size - skip));
  }
  std::vector<int64_t> lengths;
  lengths.reserve(rows.size());
  for (const Request* row : rows) {
    lengths.push_back(static_cast<int64_t>(row->group->tree.log(row->slot).size()));
  }
  return lengths;
}

int64_t SuffixForest::Follow(std::span<const Handle> requests, const Table& table,
                             std::span<const int64_t> table_rows,
                             std::span<const int64_t> starts,
                             std::span<const int32_t> num_tokens) {
  Require(table_rows.size() == requests.size() && starts.size() == requests.size(),
          "rows and starts must be as long as requests");
  for (size_t i = 0; i < requests.size(); ++i) {
    const int64_t row = table_rows[i];
    Require(row >= 0 && row < table.num_rows &&
                row < static_cast<int64_t>(num_tokens.size()),
            "rows must be in the table, and have a number of tokens");
    Require(starts[i] >= 0, "starts must not be negative");
    Require(num_tokens[row] <= table.num_columns, "rows have fewer tokens than that");
  }
  const std::lock_guard lock(mutex_);
  const std::span<Request*> rows = Rows(requests);
  for (const Request* row : rows) row->group->tree.PrefetchRequest(row->slot);
  for (const Request* row : rows) row->group->tree.PrefetchEnd(row->slot);
  // Which tokens are new depends on what is known; all are looked at before any is
  // used.
  const auto fresh = [&](size_t i) {
    const SuffixTree& tree = rows[i]->group->tree;
    const auto known = static_cast<int64_t>(tree.log(rows[i]->slot).size());
    const Token* text = table.tokens + table_rows[i] * table.stride;
    const int64_t size = num_tokens[table_rows[i]] - starts[i] - known;
    return std::pair(text + starts[i] + known, size);
  };
  int64_t num_lost = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto [tokens, size] = fresh(i);
    num_lost += size < 0;
    RequireTokens({tokens, static_cast<size_t>(std::max<int64_t>(size, 0))});
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto [tokens, size] = fresh(i);
    if (size > 0) AppendRow(*rows[i], {tokens, static_cast<size_t>(size)});
  }
  return num_lost;
}

void SuffixForest::AppendRow(Request& request, std::span<const Token> tokens) {
  SuffixTree& tree = request.group->tree;
  Learn(request, tokens);
  tree.Append(request.slot, tokens);
  request.end = tree.Cursor(request.slot);
}

std::vector<Continuations> SuffixForest::Inspect(Handle handle) const {
  const std::lock_guard lock(mutex_);
  const Request& row = request(handle);
  const SuffixTree& tree = row.group->tree;
  const Context context = tree.Locate(tree.Cursor(row.slot));
  std::vector<Continuations> orders;
  for (StateId id = context.state; id != kRoot; id = tree.state(id).link) {
    const State& state = tree.state(id);
    if (state.total == 0) continue;
    Continuations& order = orders.emplace_back();
    order.match_length = std::min(state.length, context.length);
    order.edges.push_back(state.best);
    std::ranges::copy(tree.further_edges(state), std::back_inserter(order.edges));
    std::ranges::sort(order.edges, Precedes);
  }
  return orders;
}

std::vector<Token> SuffixForest::Tokens(Handle handle, int64_t start) const {
  const std::lock_guard lock(mutex_);
  const Request& row = request(handle);
  const std::vector<Token>& log = row.group->tree.log(row.slot);
  Require(start >= 0 && start <= static_cast<int64_t>(log.size()),
          "start is outside the request");
  return {log.begin() + start, log.end()};
}

std::vector<Handle> SuffixForest::Requests(Handle handle) const {
  const std::lock_guard lock(mutex_);
  return group(handle).requests;
}

size_t SuffixForest::num_groups() const {
  const std::lock_guard lock(mutex_);
  return groups_.size();
}

size_t SuffixForest::num_tokens() const {
  const std::lock_guard lock(mutex_);
  size_t size = 0;
  for (const auto& [handle, owner] : groups_) size += owner.tree.num_tokens();
  return size;
}

size_t SuffixForest::memory_bytes() const {
  const std::lock_guard lock(mutex_);
  size_t bytes = 0;
  for (const auto& [handle, owner] : groups_) bytes += owner.tree.memory_bytes();
  bytes += requests_.capacity() * sizeof(Request) +
           batches_.capacity() * sizeof(batches_[0]);
  for (const Request& row : requests_) {
    bytes += row.forecasts.capacity() * sizeof(Prediction);
  }
  return bytes;
}

}  // namespace aseer::dgds
