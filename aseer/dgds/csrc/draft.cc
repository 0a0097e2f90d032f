// The part of SuffixForest that forecasts.

#include <algorithm>
#include <utility>

#include "forest.h"
#include "require.h"

namespace aseer::dgds {
namespace {

// Room for forecasts that is made at once.
constexpr int32_t kUsualDraft = 8;

void CheckLimits(std::span<const int32_t> max_tokens, size_t rows) {
  Require(max_tokens.size() == rows, "max_draft_tokens must be as long as requests");
  Require(std::ranges::all_of(max_tokens, [](int32_t n) { return n >= 0; }),
          "max_draft_tokens must not be negative");
}

}  // namespace

// States are mostly out of cache, and each is found by way of the one before: what one
// path waits for, all others can ask for meanwhile.
void SuffixForest::Walk(std::span<Path> paths) {
  for (const Path& path : paths) path.orders.Prefetch(*path.tree);
  for (bool walking = true; walking;) {
    walking = false;
    for (Path& path : paths) walking |= path.orders.Step(*path.tree);
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

}  // namespace aseer::dgds
