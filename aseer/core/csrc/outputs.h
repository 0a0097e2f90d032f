// What requests have generated, and the chunks that add to it: see
// aseer/core/outputs.py.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "blocks.h"
#include "slots.h"

namespace aseer {

// A report's columns, an entry a chunk: see Columns in aseer/core/columns.py.
struct Columns {
  std::string_view chunk_ids;  // int64
  std::string_view starts;     // int32, as all that follow but logprobs and text
  std::string_view counts;
  std::string_view tokens;
  std::string_view logprobs;  // float32
  std::string_view text_starts;
  std::string_view text_counts;
  std::string_view text;
};

// What one thread writes, others may read, but what is said to be the writer's alone.
class Outputs {
 public:
  struct Longest {
    int64_t chunk_id = -1;
    int64_t num_tokens = 0;
  };
  struct Taken {
    int64_t num_tokens = 0;
    std::vector<int64_t> refused{};  // places in the report, ascending
  };

  // Keeps_values: false = tokens are only counted, and text is dropped.
  explicit Outputs(bool keeps_values)
      : keeps_values_(keeps_values), table_(kMinTable) {}

  size_t Size() const;
  size_t NumRunning() const { return num_running_; }

  Handle Open();
  void Close(Handle request);
  void Clear(Handle request);
  int64_t NumTokens(Handle request) const;
  std::vector<int32_t> Tokens(Handle request) const;
  std::vector<float> Logprobs(Handle request) const;
  std::string Text(Handle request) const;

  // Keeps a request's tokens for a reader, also beyond its close.
  void Share(Handle request);
  void Unshare(Handle request);
  // The rest is of shared requests, and done while the lock is held.
  std::unique_lock<std::mutex> Lock() const { return std::unique_lock(mutex_); }
  // Ask for the memory that `Read` will touch, one after the other.
  void Prefetch(Handle request) const { __builtin_prefetch(&outputs_[request]); }
  void Prefetch(Handle request, size_t start) const;
  // Appends tokens from `start` on; returns how many.
  size_t Read(Handle request, size_t start, size_t max_tokens, std::string& out) const;

  // A chunk of a request, or none, runs; of one request at most one does.
  void Begin(int64_t chunk_id, Handle request, int64_t max_tokens);
  void End(int64_t chunk_id);
  // Takes a report. Over: places of the chunks that are over with it.
  Taken Take(const Columns& report, const std::vector<int64_t>& over);
  // The running request with the most tokens, by its chunk; -1 = none runs. Scans all
  // requests if the chunk it returned last has ended since. For the writer alone.
  Longest LongestRunning();

 private:
  // A kilobyte each: a few dozen for a long response, and little room left free.
  struct Values {
    static constexpr size_t kSize = 128;
    struct {
      int32_t token;
      float logprob;
    } of[kSize];
  };
  struct Characters {
    static constexpr size_t kSize = 1024;
    char bytes[kSize];
  };
  // A request's. What an append touches is together in one line of a cache.
  struct alignas(64) Output {
    Tail<Values> tokens{};
    Tail<Characters> text{};
    int64_t chunk_id = -1;  // that runs; -1 = none
    // What there was before it, and its limit.
    size_t first = 0;
    size_t first_text = 0;
    int64_t max_tokens = 0;
    bool is_closed = false;  // and kept for its reader
    bool is_shared = false;
    Blocks<Values> values{};
    Blocks<Characters> characters{};
  };
  // A row of the table of running chunks; a chunk id of -1 = it is free.
  struct Running {
    int64_t chunk_id = -1;
    Handle request = 0;
  };
  // One chunk's part of a report.
  struct Part {
    int64_t start;
    int64_t count;
    int64_t text_start;
    int64_t text_count;
    const char* tokens;
    const char* logprobs;
    const char* text;
  };
  static constexpr size_t kMinTable = 16;

  const Output& At(Handle request) const;
  Output& Idle(Handle request);
  // Where a chunk's row is looked for first.
  size_t Home(int64_t chunk_id) const;
  // Where a chunk's row is, or would be put.
  size_t Find(int64_t chunk_id) const;
  void Grow();
  void EndLocked(int64_t chunk_id);
  void Prefetch(std::string_view chunk_ids) const;
  bool Append(Output& output, const Part& part);
  // Takes a running request for the longest if it has more tokens.
  void UpdateLongest(const Output& output);

  bool keeps_values_;
  // Over `outputs_`; rows of the table are the writer's alone.
  mutable std::mutex mutex_;
  Slots<Output> outputs_;
  // Open addressing, at most half full.
  std::vector<Running> table_;
  size_t num_running_ = 0;
  Longest longest_;
  bool is_longest_known_ = true;
};

}  // namespace aseer
