#include "blend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

namespace aseer::dgds {
namespace {

constexpr uint32_t kMaxOrders = 4;
constexpr uint32_t kMaxCandidates = 4;
constexpr uint32_t kVoices = kRanked - 1;  // Further edges of an order that vote.
constexpr double kStrength = 1.0;          // Pseudo-count of the shorter orders,
constexpr double kShortStrength = 4.0;     // and more of it, divided by the match.
constexpr double kOwnBonus = 2.0;          // What a request wrote, it writes again.
constexpr double kFloor = 1e-3;            // Frequency of a token before any order.
constexpr double kRate = 0.0005;
constexpr double kRecentRate = 0.05;
constexpr Features kFitted = {-1.268, 0.728, 0.388,  0.218,  0.217,
                              0.214,  0.542, -0.426, -0.686, 1.075};

// log(1 + n), from a table where n is small, as it nearly always is.
double Log1p(uint32_t n) {
  static const auto table = [] {
    std::array<double, 1024> logs;
    for (size_t i = 0; i < logs.size(); ++i) logs[i] = std::log1p(i);
    return logs;
  }();
  return n < table.size() ? table[n] : std::log1p(n);
}

struct Order {
  const State* state;
  uint32_t match;
  double total;
};

struct Candidate {
  const Edge* edge;
  uint32_t order;  // The longest that proposes it.
  uint32_t firsts;
  double frequency;
};

class Ballot {
 public:
  Ballot(const SuffixTree& tree, const Context& context, Writers own) : tree_(tree) {
    Collect(context);
    Nominate(own);
    Fold();
    Rank();
  }

  uint32_t size() const { return num_candidates_; }
  const Candidate& operator[](size_t i) const { return candidates_[i]; }
  const Order& order(const Candidate& candidate) const {
    return orders_[candidate.order];
  }

  Features Describe(const Candidate& candidate, const Reader& reader) const {
    const Edge& edge = *candidate.edge;
    const double frequency = std::min(candidate.frequency, 1 - 1e-6);
    const Writers siblings = edge.writers & ~reader.writer & ~kPromptWriter;
    return {1.0,
            std::log(frequency / (1 - frequency)),
            Log1p(order(candidate).match),
            Log1p(edge.count),
            (edge.writers & reader.writer) != 0 ? 1.0 : 0.0,
            Log1p(std::popcount(siblings)),
            static_cast<double>(candidate.firsts) / num_orders_,
            Log1p(order(candidate).state->total),
            Log1p(num_orders_ - 1),
            reader.recent};
  }

 private:
  void Collect(const Context& context) {
    for (StateId id = context.state; id != kRoot && num_orders_ < kMaxOrders;) {
      const State& state = tree_.state(id);
      if (state.total > 0) {
        orders_[num_orders_++] = {&state, std::min(state.length, context.length),
                                  static_cast<double>(state.total)};
      }
      id = state.link;
    }
  }

  void Nominate(Writers own) {
    for (uint32_t i = 0; i < num_orders_; ++i) {
      const State& state = *orders_[i].state;
      const uint32_t first = Vote(i, state.best, own);
      if (first < num_candidates_) ++candidates_[first].firsts;
      const auto further = tree_.further_edges(state);
      for (const Edge& edge :
           further.first(std::min<size_t>(further.size(), kVoices))) {
        Vote(i, edge, own);
      }
    }
  }

  // Returns the candidate that `edge` is a vote for, kMaxCandidates if it is none.
  uint32_t Vote(uint32_t i, const Edge& edge, Writers own) {
    const double bonus = (edge.writers & own) != 0 ? kOwnBonus : 0;
    orders_[i].total += bonus;
    const uint32_t c = PositionOf(edge.token);
    if (c == kMaxCandidates) return c;
    if (c == num_candidates_) Add({&edge, i, 0, kFloor});
    counts_[i][c] = edge.count + bonus;
    return c;
  }

  void Add(const Candidate& candidate) {
    for (uint32_t i = 0; i < num_orders_; ++i) counts_[i][num_candidates_] = 0;
    candidates_[num_candidates_++] = candidate;
  }

  uint32_t PositionOf(Token token) const {
    uint32_t c = 0;
    while (c < num_candidates_ && candidates_[c].edge->token != token) ++c;
    return c;
  }

  void Fold() {
    for (uint32_t i = num_orders_; i-- > 0;) {
      const Order& order = orders_[i];
      const double strength = kStrength + kShortStrength / order.match;
      const double scale = 1 / (order.total + strength);
      for (uint32_t c = 0; c < num_candidates_; ++c) {
        double& frequency = candidates_[c].frequency;
        frequency = (counts_[i][c] + strength * frequency) * scale;
      }
    }
  }

  void Rank() {
    for (uint32_t i = 1; i < num_candidates_; ++i) {
      const Candidate moved = candidates_[i];
      uint32_t to = i;
      for (; to > 0 && Before(moved, candidates_[to - 1]); --to) {
        candidates_[to] = candidates_[to - 1];
      }
      candidates_[to] = moved;
    }
  }

  static bool Before(const Candidate& a, const Candidate& b) {
    return a.frequency != b.frequency ? a.frequency > b.frequency
                                      : a.edge->token < b.edge->token;
  }

  const SuffixTree& tree_;
  uint32_t num_orders_ = 0;
  uint32_t num_candidates_ = 0;
  Order orders_[kMaxOrders];
  Candidate candidates_[kMaxCandidates];
  double counts_[kMaxOrders][kMaxCandidates];
};

}  // namespace

Blend::Blend() : weights_(kFitted) {}

size_t Blend::Predict(const SuffixTree& tree, const Context& context,
                      const Reader& reader, std::span<Prediction> best) const {
  const Ballot ballot(tree, tree.Locate(context), reader.writer);
  const size_t size = std::min<size_t>(ballot.size(), best.size());
  for (size_t i = 0; i < size; ++i) {
    const Candidate& candidate = ballot[i];
    best[i].token = candidate.edge->token;
    best[i].match_length = ballot.order(candidate).match;
    best[i].edge = candidate.edge;
    best[i].features = ballot.Describe(candidate, reader);
    best[i].probability = Probability(best[i].features);
  }
  return size;
}

double Blend::Probability(const Features& features) const {
  double score = 0;
  for (size_t i = 0; i < kNumFeatures; ++i) score += weights_[i] * features[i];
  return 1 / (1 + std::exp(-score));
}

void Blend::Learn(const Prediction& prediction, bool right, Reader& reader) {
  const double outcome = right ? 1 : 0;
  reader.recent += kRecentRate * (outcome - reader.recent);
  const double step = kRate * (outcome - prediction.probability);
  for (size_t i = 0; i < kNumFeatures; ++i) {
    weights_[i] += step * prediction.features[i];
  }
}

void Blend::set_weights(std::span<const double> weights) {
  if (weights.size() != kNumFeatures) {
    throw std::invalid_argument("weights have another size");
  }
  std::ranges::copy(weights, weights_.begin());
}

}  // namespace aseer::dgds
