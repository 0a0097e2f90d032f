#include "blend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace aseer::dgds {
namespace {

constexpr uint32_t kMaxOrders = Orders::kMax;
constexpr uint32_t kMaxCandidates = kMaxOrders * kRanked;
constexpr float kStrength = 2.0f;       // Pseudo-count of the shorter orders,
constexpr float kShortStrength = 4.0f;  // and more of it, divided by the match.
constexpr uint32_t kOwnBonus = 2;       // What a request wrote, it writes again.
constexpr float kFloor = 1e-3f;         // Frequency of a token before any order.
constexpr float kRate = 0.0005f;
constexpr float kTokenRate = 0.1f;
constexpr float kRecentRate = 0.05f;
constexpr uint32_t kPlaceBits = 12;  // Of tokens, hashed.
constexpr Features kFitted = {-1.268f, 0.728f, 0.388f,  0.218f,  0.217f,
                              0.214f,  0.542f, -0.426f, -0.686f, 1.075f};

// By the tokens that an order matches.
constexpr std::array<float, 256> kStrengths = [] {
  std::array<float, 256> strengths{};
  for (size_t i = 1; i < strengths.size(); ++i) {
    strengths[i] = kStrength + kShortStrength / static_cast<float>(i);
  }
  return strengths;
}();

const std::array<float, 256> kLog1p = [] {
  std::array<float, 256> logs;
  for (size_t i = 0; i < logs.size(); ++i) logs[i] = std::log1p(static_cast<float>(i));
  return logs;
}();

// log(1 + n), from a table where n is small, as it nearly always is.
float Log1p(uint32_t n) {
  return n < kLog1p.size() ? kLog1p[n] : std::log1p(static_cast<float>(n));
}

// Where a token's two weights are, one for when it is forecast and one for when it is
// followed: beside each other, as the one comes after the other. Tokens that share a
// place share weights. By Knuth's multiplicative hash.
uint16_t PlaceOf(Token token) {
  const uint32_t hash = static_cast<uint32_t>(token) * 2654435761u;
  return static_cast<uint16_t>(2 * (hash >> (32 - kPlaceBits)));
}

// A token that some order proposes.
struct Candidate {
  float frequency;
  uint32_t order;       // The longest that proposes it,
  const Edge* edge;     // and how.
  uint32_t num_firsts;  // Orders that propose it before all others.
};

// Counts the orders' votes, each for its most frequent edges.
class Ballot {
 public:
  // The frequency of a token is, from the shortest order to the longest,
  //   frequency = (count + strength x frequency) / (total + strength),
  // and so the sum of their counts, each with a weight of its own.
  Ballot(const SuffixTree& tree, const Orders& orders, Writers own)
      : tree_(tree), orders_(orders) {
    float passed = 1;
    for (uint32_t i = 0; i < orders.size(); ++i) {
      const State& state = *orders[i].state;
      const std::span<const Edge> further = tree.further_edges(state);
      const size_t size = std::min<size_t>(1 + further.size(), kRanked);
      std::array<uint32_t, kRanked> votes;
      uint32_t total = state.total;
      for (size_t k = 0; k < size; ++k) {
        const Edge& edge = k == 0 ? state.best : further[k - 1];
        const uint32_t bonus = (edge.writers & own) != 0 ? kOwnBonus : 0;
        votes[k] = edge.count + bonus;
        total += bonus;
      }
      const float strength = kStrengths[orders[i].match];
      const float scale = passed / (static_cast<float>(total) + strength);
      passed = strength * scale;
      const uint32_t known = size_;  // An order proposes a token once.
      for (size_t k = 0; k < size; ++k) {
        const Edge& edge = k == 0 ? state.best : further[k - 1];
        Candidate& candidate = Find(edge.token, known);
        if (&candidate == &candidates_[size_]) {
          candidate = {0, i, &edge, 0};
          ++size_;
        }
        candidate.frequency += scale * static_cast<float>(votes[k]);
        candidate.num_firsts += k == 0;
      }
    }
    floor_ = kFloor * passed;
  }

  // The likeliest candidate that has not been elected yet, or nullptr.
  const Candidate* Elect() {
    uint32_t best = size_;
    for (uint32_t j = 0; j < size_; ++j) {
      if ((elected_ >> j & 1) != 0) continue;
      if (best == size_ || IsBefore(candidates_[j], candidates_[best])) best = j;
    }
    elected_ |= 1u << best;
    return best == size_ ? nullptr : &candidates_[best];
  }

  Prediction Describe(const Candidate& elected, const Reader& reader) const {
    const Edge& edge = *elected.edge;
    const Order& order = orders_[elected.order];
    const float frequency = std::min(elected.frequency + floor_, 1 - 1e-6f);
    const Writers siblings = edge.writers & ~reader.writer & ~kPromptWriter;
    const auto num_orders = static_cast<float>(orders_.size());
    return {tree_.Advance(edge, order.match),
            0,
            {1, std::log(frequency / (1 - frequency)), kLog1p[order.match],
             Log1p(edge.count), (edge.writers & reader.writer) != 0 ? 1.0f : 0.0f,
             kLog1p[std::popcount(siblings)],
             static_cast<float>(elected.num_firsts) / num_orders,
             Log1p(order.state->total), kLog1p[orders_.size() - 1], reader.recent},
            {PlaceOf(edge.token), static_cast<uint16_t>(PlaceOf(orders_.last()) + 1)}};
  }

 private:
  // The first `known` candidates' of this token, or the place for one more.
  Candidate& Find(Token token, uint32_t known) {
    for (uint32_t j = 0; j < known; ++j) {
      if (candidates_[j].edge->token == token) return candidates_[j];
    }
    return candidates_[size_];
  }

  static bool IsBefore(const Candidate& a, const Candidate& b) {
    return a.frequency != b.frequency ? a.frequency > b.frequency
                                      : a.edge->token < b.edge->token;
  }

  const SuffixTree& tree_;
  const Orders& orders_;
  uint32_t size_ = 0;
  uint32_t elected_ = 0;  // Bit j: candidate j.
  float floor_;
  std::array<Candidate, kMaxCandidates + 1> candidates_;
};

}  // namespace

Blend::Blend() : weights_(kFitted), token_weights_(2 << kPlaceBits) {}

size_t Blend::Predict(const SuffixTree& tree, const Orders& orders,
                      const Reader& reader, size_t most,
                      std::vector<Prediction>& predictions) const {
  Ballot ballot(tree, orders, reader.writer);
  size_t size = 0;
  for (; size < most; ++size) {
    const Candidate* elected = ballot.Elect();
    if (elected == nullptr) break;
    Prediction& prediction =
        predictions.emplace_back(ballot.Describe(*elected, reader));
    prediction.probability = Probability(prediction);
  }
  return size;
}

float Blend::Probability(const Prediction& prediction) const {
  std::array<float, 4> sums = {token_weights_[prediction.places[0]],
                               token_weights_[prediction.places[1]]};
  for (size_t i = 0; i < kNumFeatures; ++i) {
    sums[i % 4] += weights_[i] * prediction.features[i];
  }
  return 1 / (1 + std::exp(-(sums[0] + sums[1] + sums[2] + sums[3])));
}

void Blend::Learn(const Prediction& prediction, bool right, float& recent) {
  const float outcome = right ? 1 : 0;
  recent += kRecentRate * (outcome - recent);
  const float error = outcome - prediction.probability;
  for (size_t i = 0; i < kNumFeatures; ++i) {
    weights_[i] += kRate * error * prediction.features[i];
  }
  for (const uint16_t place : prediction.places) {
    token_weights_[place] += kTokenRate * error;
  }
}

}  // namespace aseer::dgds
