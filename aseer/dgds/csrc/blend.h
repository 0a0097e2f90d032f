// Which token comes next, and how likely it is to be accepted.
//
// The longest orders of context that match cast a vote each. As in PPM with
// interpolated counts, the orders are folded from the shortest to the longest, each
// trusting itself by how often it was seen; the token of the highest blended frequency
// is drafted.
//
// That frequency is not yet a probability of acceptance: the texts are few and alike.
// A logistic regression on it, the length of the match, how often and by whom the
// token was written there, how many orders agree, and how well this request has been
// forecast of late makes it one. Its weights start from a fit on recorded responses
// and follow each forecast's fate by stochastic gradient descent. So do, from nothing,
// those of two sparse features: which token is forecast, and which token it follows.

#ifndef ASEER_DGDS_BLEND_H_
#define ASEER_DGDS_BLEND_H_

#include <array>
#include <span>
#include <vector>

#include "cst.h"

namespace aseer::dgds {

inline constexpr size_t kNumFeatures = 10;
using Features = std::array<float, kNumFeatures>;
// Where the weights are of the token that is forecast, and of the one before it.
using Places = std::array<uint16_t, 2>;

struct Order {
  const State* state;
  uint32_t match;  // Tokens of the context.
};

// The longest orders of a context, found by a walk along links, as far as the first
// that has always been followed by the same token: the shorter ones know less (the
// deterministic contexts of PPM*, Cleary & Teahan 1997; there, the shortest of them).
// The states are mostly out of cache: each step asks for what the next one and Blend
// will read, so that walks that take turns wait for nothing. Valid until the tree
// changes.
class Orders {
 public:
  static constexpr uint32_t kMax = 3;
  static constexpr uint32_t kSure = 2;  // Times, for "always" to mean something.

  // `is_located`: the context's state is known to be the one that has it.
  explicit Orders(const Context& context, bool is_located = false)
      : next_(context.state),
        length_(context.length),
        last_(context.last),
        is_located_(is_located) {}

  // Asks for what the first step will read.
  void Prefetch(const SuffixTree& tree) const { tree.Prefetch(next_); }

  // Visits one state; false if the walk is over.
  bool Step(const SuffixTree& tree) {
    if (next_ == kRoot) return false;
    const State& state = tree.state(next_);
    if (state.length >= length_) {
      size_ = 0;  // Of these the last has the context.
      is_sure_ = false;
    }
    if (is_sure_) {
      next_ = kRoot;
      return false;
    }
    orders_[size_] = {&state, std::min(state.length, length_)};
    size_ += state.total > 0;
    is_sure_ = state.block == 0 && state.total >= kSure;
    tree.PrefetchEdges(state);
    is_located_ |= state.length < length_;
    next_ = (is_sure_ && is_located_) || size_ == kMax ? kRoot : state.link;
    tree.Prefetch(next_);
    return next_ != kRoot;
  }

  Token last() const { return last_; }  // Of the context.
  uint32_t size() const { return size_; }
  const Order& operator[](size_t i) const { return orders_[i]; }

 private:
  StateId next_;
  uint32_t length_;
  Token last_;
  uint32_t size_ = 0;
  bool is_located_;
  bool is_sure_ = false;                // The order found last.
  std::array<Order, kMax + 1> orders_;  // One more, written and not counted.
};

// The request that a prediction is for.
struct Reader {
  Writers writer;  // Its bit.
  float recent;    // Share of its forecasts that came true, lately.
};

struct Prediction {
  Context context;  // Up to the token predicted: its last.
  float probability;
  Features features;
  Places places;
};

class Blend {
 public:
  Blend();

  // Adds the likeliest continuations of a context, given its orders, at most `most`;
  // returns how many there are. O(1).
  size_t Predict(const SuffixTree& tree, const Orders& orders, const Reader& reader,
                 size_t most, std::vector<Prediction>& predictions) const;
  // One step of gradient descent for a prediction whose token came, or did not.
  void Learn(const Prediction& prediction, bool right, float& recent);

 private:
  float Probability(const Prediction& prediction) const;

  Features weights_;
  std::vector<float> token_weights_;
};

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_BLEND_H_
