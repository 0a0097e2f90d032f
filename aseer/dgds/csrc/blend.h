// Which token comes next, and how likely it is to be accepted.
//
// Every order of context that matches casts a vote. As in PPM with interpolated,
// discounted counts (a Pitman-Yor back-off), the orders are folded from the shortest
// to the longest, each trusting itself by how often it was seen and by how varied
// what followed it was; the token of the highest blended frequency is drafted.
//
// That frequency is not yet a probability of acceptance: the texts are few and alike.
// A logistic regression on it, the length of the match, how often and by whom the
// token was written there, how many orders agree, and how well this request has been
// forecast of late makes it one. Its weights start from a fit on recorded responses
// and follow each forecast's fate by stochastic gradient descent.

#ifndef ASEER_DGDS_BLEND_H_
#define ASEER_DGDS_BLEND_H_

#include <array>
#include <span>
#include <vector>

#include "cst.h"

namespace aseer::dgds {

inline constexpr size_t kNumFeatures = 10;
using Features = std::array<double, kNumFeatures>;

// The request that a prediction is for.
struct Reader {
  Writers writer;       // Its bit.
  double recent = 0.5;  // Share of its forecasts that came true, lately.
};

struct Prediction {
  Token token;
  uint32_t match_length;  // Of the context that `edge` continues.
  const Edge* edge;       // Valid until the tree changes.
  double probability;
  Features features;
};

class Blend {
 public:
  Blend();

  // Fills `best` with the likeliest continuations of `context`; returns how many there
  // are. O(1): only the longest kMaxOrders orders vote.
  size_t Predict(const SuffixTree& tree, const Context& context, const Reader& reader,
                 std::span<Prediction> best) const;
  // One step of gradient descent for a prediction whose token came, or did not.
  void Learn(const Prediction& prediction, bool right, Reader& reader);

  std::vector<double> weights() const { return {weights_.begin(), weights_.end()}; }
  void set_weights(std::span<const double> weights);

 private:
  double Probability(const Features& features) const;

  Features weights_;
};

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_BLEND_H_
