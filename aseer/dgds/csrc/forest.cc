#include "forest.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace aseer::dgds {
namespace {

// Room for forecasts that is made at once.
constexpr int32_t kUsualDraft = 8;

void Require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void CheckOffsets(std::span<const int64_t> offsets, size_t rows, size_t size) {
  Require(offsets.size() == rows + 1, "offsets must be one longer than requests");
  Require(offsets.front() == 0 && offsets.back() == static_cast<int64_t>(size),
          "offsets must start at 0 and end at the number of tokens");
  Require(std::ranges::is_sorted(offsets), "offsets must not decrease");
}

void CheckLimits(std::span<const int32_t> max_tokens, size_t rows) {
  Require(max_tokens.size() == rows, "max_draft_tokens must be as long as requests");
  Require(std::ranges::all_of(max_tokens, [](int32_t n) { return n >= 0; }),
          "max_draft_tokens must not be negative");
}

}  // namespace

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

// States are mostly out of cache, and each is found by way of the one before: what one
// path waits for, all others can ask for meanwhile.
void SuffixForest::Walk(std::span<Path> paths) {
  for (const Path& path : paths) path.orders.Prefetch(*path.tree);
  for (bool walking = true; walking;) {
    walking = false;
    for (Path& path : paths) walking |= path.orders.Step(*path.tree);
  }
}

std::vector<int64_t> SuffixForest::Append(std::span<const Handle> requests,
                                          std::span<const Token> tokens,
                                          std::span<const int64_t> offsets,
                                          std::span<const int64_t> starts) {
  CheckOffsets(offsets, requests.size(), tokens.size());
  Require(starts.empty() || starts.size() == requests.size(),
          "starts must be as long as requests");
  Require(std::ranges::all_of(starts, [](int64_t start) { return start >= 0; }),
          "starts must not be negative");
  Require(std::ranges::all_of(tokens, [](Token token) { return token >= 0; }),
          "tokens must not be negative");
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
    Require(std::all_of(tokens, tokens + std::max<int64_t>(size, 0),
                        [](Token token) { return token >= 0; }),
            "tokens must not be negative");
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

// What has come true is done with. What was forecast after a wrong token is about
// another text: it teaches nothing.
void SuffixForest::Learn(Request& request, std::span<const Token> tokens) {
  std::vector<Prediction>& forecasts = request.forecasts;
  const size_t size = std::min(tokens.size(), forecasts.size());
  size_t num_right = 0;
  for (bool right = true; right && num_right < size; num_right += right) {
    const Prediction& forecast = forecasts[num_right];
    right = forecast.context.last == tokens[num_right];
    blend_.Learn(forecast, right, request.recent);
    if (!right) forecasts.clear();
  }
  if (!forecasts.empty()) {
    forecasts.erase(forecasts.begin(), forecasts.begin() + num_right);
  }
}

void SuffixForest::RequireDistinct(std::span<const Handle> requests) {
  batches_.resize(requests_.size());
  ++num_batches_;
  for (const Handle handle : requests) {
    uint64_t& batch = batches_[static_cast<uint32_t>(handle)];
    Require(batch != num_batches_, "requests repeat");
    batch = num_batches_;
  }
}

Drafts SuffixForest::Draft(std::span<const Handle> requests,
                           std::span<const int32_t> max_tokens, float min_confidence) {
  CheckLimits(max_tokens, requests.size());
  const std::lock_guard lock(mutex_);
  const std::span<Request*> rows = Rows(requests);
  RequireDistinct(requests);
  paths_.clear();
  for (size_t i = 0; i < rows.size(); ++i) {
    // What was forecast before and came true so far need not be forecast again.
    auto tokens_left = static_cast<uint32_t>(max_tokens[i]);
    double confidence = 1;
    for (const Prediction& forecast : rows[i]->forecasts) {
      confidence *= forecast.probability;
      if (confidence < min_confidence) tokens_left = 0;
      if (tokens_left == 0) break;
      --tokens_left;
    }
    if (tokens_left > 0) {
      rows[i]->forecasts.reserve(std::min(max_tokens[i], kUsualDraft));
      paths_.emplace_back(rows[i], tokens_left, confidence);
    }
  }
  while (!paths_.empty()) {
    Walk(paths_);
    for (Path& path : paths_) Predict(path);
    std::erase_if(paths_, [&](Path& path) { return !Extend(path, min_confidence); });
  }
  return Collect(rows, max_tokens, min_confidence);
}

// Forecasts one token more, if there is any.
void SuffixForest::Predict(Path& path) const {
  Request& request = *path.request;
  path.forecast = blend_.Predict(*path.tree, path.orders, request.reader(), 1,
                                 request.forecasts) > 0;
}

// Goes on to after the token forecast last; false if the path ends. A token that is
// too doubtful to be drafted stays forecast, so that doubt is put right as readily as
// confidence. Apart from Predict, as no processor should wait here for one path's
// confidence before it looks at the next.
bool SuffixForest::Extend(Path& path, double min_confidence) const {
  if (!path.forecast) return false;
  const Prediction& best = path.request->forecasts.back();
  path.confidence *= best.probability;
  if (path.confidence < min_confidence || --path.tokens_left == 0) return false;
  // No string was cut off: an edge leads to its own state.
  const bool is_located = best.context.length < max_match_;
  path.orders = Orders(best.context, is_located);
  return true;
}

Drafts SuffixForest::Collect(std::span<Request* const> rows,
                             std::span<const int32_t> max_tokens,
                             double min_confidence) {
  Drafts drafts;
  size_t most = 0;
  for (const Request* row : rows) most += row->forecasts.size();
  drafts.tokens.reserve(most);
  drafts.confidences.reserve(most);
  drafts.offsets.reserve(rows.size() + 1);
  drafts.offsets.push_back(0);
  for (size_t i = 0; i < rows.size(); ++i) {
    double confidence = 1;
    int32_t left = max_tokens[i];
    for (const Prediction& forecast : rows[i]->forecasts) {
      confidence *= forecast.probability;
      if (confidence < min_confidence || left-- == 0) break;
      drafts.tokens.push_back(forecast.context.last);
      drafts.confidences.push_back(static_cast<float>(confidence));
    }
    drafts.offsets.push_back(static_cast<int64_t>(drafts.tokens.size()));
  }
  return drafts;
}

Drafts SuffixForest::DraftTree(std::span<const Handle> requests,
                               std::span<const int32_t> max_tokens, uint32_t top_k,
                               float min_confidence) const {
  CheckLimits(max_tokens, requests.size());
  Require(top_k > 0, "top_k must be positive");
  const std::lock_guard lock(mutex_);
  std::vector<const Request*> rows;
  for (const Handle handle : requests) rows.push_back(&request(handle));
  Drafts drafts;
  drafts.offsets.push_back(0);
  for (size_t i = 0; i < rows.size(); ++i) {
    DraftTreeRow(*rows[i], max_tokens[i], top_k, min_confidence, drafts);
    drafts.offsets.push_back(static_cast<int64_t>(drafts.tokens.size()));
  }
  return drafts;
}

void SuffixForest::DraftTreeRow(const Request& request, uint32_t max_tokens,
                                uint32_t top_k, double min_confidence,
                                Drafts& drafts) const {
  struct Branch {
    Context context;
    int32_t node;
    double confidence;
    // The same whatever the order of its factors.
    float rank() const { return static_cast<float>(confidence); }
  };
  const SuffixTree& tree = request.group->tree;
  const auto first = static_cast<int32_t>(drafts.tokens.size());
  std::vector<Branch> beam{{tree.Cursor(request.slot), -1, 1.0}};
  std::vector<Prediction> predictions;
  for (uint32_t depth = 0; depth < max_tokens && !beam.empty(); ++depth) {
    std::vector<Branch> wider;
    for (const Branch& branch : beam) {
      Orders orders(branch.context);
      while (orders.Step(tree)) {
      }
      predictions.clear();
      blend_.Predict(tree, orders, request.reader(), top_k, predictions);
      for (const Prediction& next : predictions) {
        const double confidence = branch.confidence * next.probability;
        if (confidence < min_confidence) continue;
        wider.push_back({next.context, branch.node, confidence});
      }
    }
    std::ranges::stable_sort(wider, std::ranges::greater{}, &Branch::rank);
    if (wider.size() > top_k) wider.resize(top_k);
    for (Branch& branch : wider) {
      drafts.tokens.push_back(branch.context.last);
      drafts.parents.push_back(branch.node);
      drafts.confidences.push_back(static_cast<float>(branch.confidence));
      branch.node = static_cast<int32_t>(drafts.tokens.size()) - 1 - first;
    }
    beam = std::move(wider);
  }
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
