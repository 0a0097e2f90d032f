#include "spend.h"

#include <algorithm>
#include <numeric>

#include "require.h"

namespace aseer::dgds {

Spent Spend(std::span<const double> survivals, std::span<const int64_t> offsets,
            std::span<const double> weights, std::span<const double> step_s,
            double margin) {
  const size_t num_rows = weights.size();
  const size_t size = survivals.size();
  RequireOffsets(offsets, num_rows, size);
  Require(step_s.size() == size + 1, "step_s must be one longer than survivals");
  Spent spent{std::vector<int64_t>(num_rows)};
  if (size == 0 || step_s[0] <= 0) return spent;
  struct Offer {
    double worth;
    double survival;
    uint32_t row;
  };
  std::vector<Offer> offers;
  offers.reserve(size);
  for (uint32_t row = 0; row < num_rows; ++row) {
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
      offers.push_back({survivals[i] * weights[row], survivals[i], row});
    }
  }
  // Stable, so that a row's tokens stay in their order.
  std::ranges::stable_sort(offers, std::ranges::greater{}, &Offer::worth);
  const double plain = static_cast<double>(num_rows) / step_s[0];
  double tokens = static_cast<double>(num_rows);
  double worth = std::accumulate(weights.begin(), weights.end(), 0.0);
  double best_rate = 0;
  size_t most = 0;
  for (size_t k = 1; k <= size; ++k) {
    tokens += offers[k - 1].survival;
    worth += offers[k - 1].worth;
    const bool is_admitted = tokens / step_s[k] >= plain * (1 + margin);
    if (!is_admitted || worth / step_s[k] <= best_rate) continue;
    best_rate = worth / step_s[k];
    most = k;
    spent.saved_s = tokens / plain - step_s[k];
  }
  for (size_t k = 0; k < most; ++k) ++spent.lengths[offers[k].row];
  return spent;
}

}  // namespace aseer::dgds
