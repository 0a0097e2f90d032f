#ifndef ASEER_DGDS_REQUIRE_H_
#define ASEER_DGDS_REQUIRE_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace aseer::dgds {

// Each throws std::invalid_argument unless an argument is as it must be.

inline void Require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void RequireTokens(std::span<const int32_t> tokens) {
  Require(std::ranges::all_of(tokens, [](int32_t token) { return token >= 0; }),
          "tokens must not be negative");
}

// Row i of `size` values is [offsets[i], offsets[i + 1]).
inline void RequireOffsets(std::span<const int64_t> offsets, size_t rows, size_t size) {
  Require(offsets.size() == rows + 1, "offsets must be one longer than there are rows");
  Require(offsets.front() == 0 && offsets.back() == static_cast<int64_t>(size),
          "offsets must start at 0 and end at the number of values");
  Require(std::ranges::is_sorted(offsets), "offsets must not decrease");
}

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_REQUIRE_H_
