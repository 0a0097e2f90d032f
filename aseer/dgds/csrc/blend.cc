#include "blend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace aseer::dgds {
namespace {

constexpr uint32_t kMaxOrders = Orders::kMax;
constexpr uint32_t kMaxCandidates = kMaxOrders * kRanked;
constexpr float kStrength = 2.0f;       // Pseudo-count of the shorter orders,
constexpr float kShortStrength = 4.0f;  // and more of it, divided by the match.
constexpr uint32_t kOwnBonus = 2;       // What a request wrote, it writes again.
constexpr float kFloor = 1e-3f;         // Frequency of a token before any order.
constexpr float kTolerance = 1e-5f;     // Of sums of frequencies.
constexpr double kRate = 0.0005;
constexpr double kTokenRate = 0.1;
constexpr double kRecentRate = 0.05;
constexpr uint32_t kPlaceBits = 12;  // Of tokens, hashed.
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

// Tokens that share a place share a weight. By Knuth's multiplicative hash.
uint16_t PlaceOf(Token token) {
  return static_cast<uint16_t>(static_cast<uint32_t>(token) * 2654435761u >>
                               (32 - kPlaceBits));
}

// A token that some order proposes.
struct Candidate {
  Token token;
  float frequency;
  uint32_t order;       // The longest that proposes it,
  const Edge* edge;     // and how.
  uint32_t num_firsts;  // Orders that propose it before all others.
};

// Counts the votes for one candidate after the other: the best edges of all orders.
class Ballot {
 public:
  Ballot(const SuffixTree& tree, const Orders& orders, Writers own)
      : orders_(orders), own_(own) {
    // The frequency of a token is, from the shortest order to the longest,
    //   frequency = (count + strength x frequency) / (total + strength),
    // and so the sum of their counts, each with a weight of its own.
    float passed = 1;
    for (uint32_t i = 0; i < orders.size(); ++i) {
      const State& state = *orders[i].state;
      const std::span<const Edge> further = tree.further_edges(state);
      further_[i] = further.first(std::min<size_t>(further.size(), kRanked - 1));
      uint32_t total = state.total + Bonus(state.best);
      for (const Edge& edge : further_[i]) total += Bonus(edge);
      const float strength =
          kStrength + kShortStrength / static_cast<float>(orders[i].match);
      const float scale = passed / (static_cast<float>(total) + strength);
      weights_[i] = scale;
      passed = strength * scale;
    }
    floor_ = kFloor * passed;
  }

  // Finds the likeliest `most` candidates, in order; returns how many there are.
  // Frequencies add up to at most one: who has more than is left for all that have not
  // been counted is before them.
  size_t Elect(size_t most) {
    size_t size = 0;
    float left = 1 + kTolerance;
    for (uint32_t k = 0; k < kRanked; ++k) {
      for (uint32_t i = 0; i < orders_.size(); ++i) {
        if (k > further_[i].size()) continue;
        const Edge& edge = k == 0 ? orders_[i].state->best : further_[i][k - 1];
        if (IsCounted(edge.token, size)) continue;
        left -= Count(edge.token, candidates_[size]);
        for (size_t j = size++; j > 0 && IsBefore(j, j - 1); --j) {
          std::swap(candidates_[j], candidates_[j - 1]);
        }
        if (size >= most && candidates_[most - 1].frequency > left) return most;
      }
    }
    return std::min(size, most);
  }

  Prediction Describe(size_t rank, const Reader& reader) const {
    const Candidate& elected = candidates_[rank];
    const Edge& edge = *elected.edge;
    const Order& order = orders_[elected.order];
    const float frequency = std::min(elected.frequency, 1 - 1e-6f);
    const Writers siblings = edge.writers & ~reader.writer & ~kPromptWriter;
    const auto num_orders = static_cast<float>(orders_.size());
    return {
        edge.token,
        order.match,
        &edge,
        0,
        {1, std::log(frequency / (1 - frequency)), Log1p(order.match),
         Log1p(edge.count), (edge.writers & reader.writer) != 0 ? 1.0f : 0.0f,
         Log1p(std::popcount(siblings)),
         static_cast<float>(elected.num_firsts) / num_orders, Log1p(order.state->total),
         Log1p(orders_.size() - 1), static_cast<float>(reader.recent)},
        {PlaceOf(edge.token),
         static_cast<uint16_t>(PlaceOf(orders_.last()) + (1 << kPlaceBits))}};
  }

 private:
  uint32_t Bonus(const Edge& edge) const {
    return (edge.writers & own_) != 0 ? kOwnBonus : 0;
  }

  const Edge* Find(uint32_t i, Token token) const {
    const Edge& best = orders_[i].state->best;
    if (best.token == token) return &best;
    for (const Edge& edge : further_[i]) {
      if (edge.token == token) return &edge;
    }
    return nullptr;
  }

  float Count(Token token, Candidate& candidate) const {
    candidate = {token, floor_, 0, nullptr, 0};
    for (uint32_t i = orders_.size(); i-- > 0;) {
      const Edge* edge = Find(i, token);
      if (edge == nullptr) continue;
      const uint32_t votes = edge->count + Bonus(*edge);
      candidate.frequency += weights_[i] * static_cast<float>(votes);
      candidate.order = i;
      candidate.edge = edge;
      candidate.num_firsts += edge == &orders_[i].state->best;
    }
    return candidate.frequency;
  }

  bool IsCounted(Token token, size_t size) const {
    for (size_t j = 0; j < size; ++j) {
      if (candidates_[j].token == token) return true;
    }
    return false;
  }

  bool IsBefore(size_t j, size_t k) const {
    const Candidate& a = candidates_[j];
    const Candidate& b = candidates_[k];
    return a.frequency != b.frequency ? a.frequency > b.frequency : a.token < b.token;
  }

  const Orders& orders_;
  Writers own_;
  std::array<std::span<const Edge>, kMaxOrders> further_;
  std::array<float, kMaxOrders> weights_;
  float floor_;
  std::array<Candidate, kMaxCandidates> candidates_;
};

}  // namespace

Blend::Blend() : weights_(kFitted), token_weights_(2 << kPlaceBits) {}

size_t Blend::Predict(const SuffixTree& tree, const Orders& orders,
                      const Reader& reader, std::span<Prediction> best) const {
  Ballot ballot(tree, orders, reader.writer);
  const size_t size = ballot.Elect(best.size());
  for (size_t i = 0; i < size; ++i) {
    best[i] = ballot.Describe(i, reader);
    best[i].probability = Probability(best[i]);
  }
  return size;
}

double Blend::Probability(const Prediction& prediction) const {
  double even = token_weights_[prediction.places[0]];
  double odd = token_weights_[prediction.places[1]];
  for (size_t i = 0; i < kNumFeatures; i += 2) {
    even += weights_[i] * prediction.features[i];
    odd += weights_[i + 1] * prediction.features[i + 1];
  }
  return 1 / (1 + std::exp(-static_cast<float>(even + odd)));
}

void Blend::Learn(const Prediction& prediction, bool right, Reader& reader) {
  const double outcome = right ? 1 : 0;
  reader.recent += kRecentRate * (outcome - reader.recent);
  const double error = outcome - prediction.probability;
  for (size_t i = 0; i < kNumFeatures; ++i) {
    weights_[i] += kRate * error * prediction.features[i];
  }
  for (const uint16_t place : prediction.places) {
    token_weights_[place] += static_cast<float>(kTokenRate * error);
  }
}

}  // namespace aseer::dgds
