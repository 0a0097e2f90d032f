#include "blend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace aseer::dgds {
namespace {

constexpr uint32_t kMaxOrders = Orders::kMax;
constexpr uint32_t kMaxCandidates = 4;
constexpr double kStrength = 1.0;       // Pseudo-count of the shorter orders,
constexpr double kShortStrength = 4.0;  // and more of it, divided by the match.
constexpr int32_t kOwnBonus = 2;        // What a request wrote, it writes again.
constexpr double kFloor = 1e-3;         // Frequency of a token before any order.
constexpr double kRate = 0.0005;
constexpr double kRecentRate = 0.05;
constexpr std::array<double, kNumFeatures> kFitted = {
    -1.268, 0.728, 0.388, 0.218, 0.217, 0.214, 0.542, -0.426, -0.686, 1.075};

const std::array<float, 256> kLog1p = [] {
  std::array<float, 256> logs;
  for (size_t i = 0; i < logs.size(); ++i) logs[i] = std::log1p(static_cast<float>(i));
  return logs;
}();

// log(1 + n), from a table where n is small, as it nearly always is.
float Log1p(uint32_t n) {
  return n < kLog1p.size() ? kLog1p[n] : std::log1p(static_cast<float>(n));
}

constexpr Edge kNoEdge = {};

// A number for each candidate.
using Lanes [[gnu::vector_size(16)]] = int32_t;
using Reals [[gnu::vector_size(32)]] = double;

constexpr Lanes kLane[kMaxCandidates + 1] = {
    {-1, 0, 0, 0}, {0, -1, 0, 0}, {0, 0, -1, 0}, {0, 0, 0, -1}, {}};

bool Any(Lanes lanes) {
  const auto halves = std::bit_cast<std::array<uint64_t, 2>>(lanes);
  return (halves[0] | halves[1]) != 0;
}

// Mispredicted branches would cost more than all else here: every order casts as many
// votes, and all candidates, a lane each, are treated alike, however many there are.
class Ballot {
 public:
  Ballot(const SuffixTree& tree, const Orders& orders, Writers own) : orders_(orders) {
    for (uint32_t i = 0; i < orders.size(); ++i) {
      const State& state = *orders[i].state;
      const std::span<const Edge> further = tree.further_edges(state);
      totals_[i] = static_cast<int32_t>(state.total);
      firsts_ -= Vote(i, &state.best, own);
      for (size_t k = 0; k + 1 < kRanked; ++k) {
        Vote(i, k < further.size() ? further.data() + k : &kNoEdge, own);
      }
    }
    Fold();
  }

  uint32_t size() const { return size_; }

  // The candidate of rank `rank`, if those of lower ranks have been asked for. Lanes
  // without a candidate have the lowest frequency.
  uint32_t Ranked(uint32_t rank) {
    uint32_t best = rank;
    for (uint32_t i = rank + 1; i < kMaxCandidates; ++i) {
      best = Before(ranking_[i], ranking_[best]) ? i : best;
    }
    std::swap(ranking_[rank], ranking_[best]);
    return ranking_[rank];
  }

  Prediction Describe(uint32_t candidate, const Reader& reader) const {
    const Edge& edge = *edges_[candidate];
    const Order& order = orders_[longest_[candidate]];
    const double frequency = std::min(frequencies_[candidate], 1 - 1e-6);
    const Writers siblings = edge.writers & ~reader.writer & ~kPromptWriter;
    const auto num_orders = static_cast<float>(orders_.size());
    return {
        edge.token,
        order.match,
        &edge,
        0,
        {1, std::log(static_cast<float>(frequency / (1 - frequency))),
         Log1p(order.match), Log1p(edge.count),
         (edge.writers & reader.writer) != 0 ? 1.0f : 0.0f,
         Log1p(std::popcount(siblings)),
         static_cast<float>(firsts_[candidate]) / num_orders, Log1p(order.state->total),
         Log1p(orders_.size() - 1), static_cast<float>(reader.recent)}};
  }

 private:
  // Returns the lane of the candidate that `edge` is a vote for: all ones, the others
  // 0.
  Lanes Vote(uint32_t i, const Edge* edge, Writers own) {
    const int32_t bonus = (edge->writers & own) != 0 ? kOwnBonus : 0;
    const Lanes token = Lanes{} + edge->token;
    Lanes lane = tokens_ == token;
    const bool is_new = !Any(lane) & (edge->token >= 0);
    edges_[size_] = edge;
    longest_[size_] = i;
    lane |= kLane[is_new ? size_ : kMaxCandidates];
    tokens_ = (tokens_ & ~lane) | (token & lane);
    size_ += is_new & (size_ < kMaxCandidates);
    totals_[i] += bonus;
    counts_[i] += lane & (static_cast<int32_t>(edge->count) + bonus);
    return lane;
  }

  void Fold() {
    Reals frequencies = Reals{} + kFloor;
    for (uint32_t i = orders_.size(); i-- > 0;) {
      const double strength = kStrength + kShortStrength / orders_[i].match;
      const double scale = 1 / (totals_[i] + strength);
      const Reals counts = __builtin_convertvector(counts_[i], Reals);
      frequencies = (counts + strength * frequencies) * scale;
    }
    frequencies_ = frequencies;
  }

  bool Before(uint32_t a, uint32_t b) const {
    const bool is_more = frequencies_[a] > frequencies_[b];
    const bool is_equal = frequencies_[a] == frequencies_[b];
    return is_more | (is_equal & (tokens_[a] < tokens_[b]));
  }

  const Orders& orders_;
  uint32_t size_ = 0;
  Lanes tokens_ = {-1, -1, -1, -1};
  Lanes firsts_ = {};  // Orders that propose it before all others.
  Lanes counts_[kMaxOrders] = {};
  Reals frequencies_;
  int32_t totals_[kMaxOrders];
  uint32_t ranking_[kMaxCandidates] = {0, 1, 2, 3};
  // With room for one that finds no lane.
  uint32_t longest_[kMaxCandidates + 1];  // Order that proposes it.
  const Edge* edges_[kMaxCandidates + 1];
};

}  // namespace

Blend::Blend() : weights_(kFitted) {}

size_t Blend::Predict(const SuffixTree& tree, const Orders& orders,
                      const Reader& reader, std::span<Prediction> best) const {
  Ballot ballot(tree, orders, reader.writer);
  const size_t size = std::min<size_t>(ballot.size(), best.size());
  for (size_t i = 0; i < size; ++i) {
    best[i] = ballot.Describe(ballot.Ranked(i), reader);
    best[i].probability = Probability(best[i].features);
  }
  return size;
}

double Blend::Probability(const Features& features) const {
  double even = 0;
  double odd = 0;
  for (size_t i = 0; i < kNumFeatures; i += 2) {
    even += weights_[i] * features[i];
    odd += weights_[i + 1] * features[i + 1];
  }
  return 1 / (1 + std::exp(-static_cast<float>(even + odd)));
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
