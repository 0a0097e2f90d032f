// How a step's draft tokens are shared out among its requests; see budget.py.

#ifndef ASEER_DGDS_SPEND_H_
#define ASEER_DGDS_SPEND_H_

#include <cstdint>
#include <span>
#include <vector>

namespace aseer::dgds {

struct Spent {
  std::vector<int64_t> lengths;  // How much of each row to draft.
  double saved_s = 0;            // How much longer plain steps take for as much.
};

// Row i is [offsets[i], offsets[i + 1]) of `survivals`, which never rise along it, and
// a token of it is worth weights[i]; step_s[k] are the seconds of a step with k tokens
// drafted. O(n log n). Throws std::invalid_argument if the sizes disagree.
Spent Spend(std::span<const double> survivals, std::span<const int64_t> offsets,
            std::span<const double> weights, std::span<const double> step_s,
            double margin);

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_SPEND_H_
