#include "outputs.h"

#include <algorithm>
#include <cstring>

namespace aseer {
namespace {

constexpr size_t kTokenBytes = 4;

template <typename Number>
Number ReadAt(std::string_view column, size_t place) {
  Number number;
  std::memcpy(&number, column.data() + place * sizeof(Number), sizeof(Number));
  return number;
}

int64_t Int32At(std::string_view column, size_t place) {
  return column.empty() ? 0 : ReadAt<int32_t>(column, place);
}

// Entries of a column of counts together; a negative one is a chunk's own fault.
size_t Sum(std::string_view counts) {
  size_t sum = 0;
  for (size_t i = 0; i < counts.size() / sizeof(int32_t); ++i) {
    sum += static_cast<size_t>(std::max<int64_t>(0, Int32At(counts, i)));
  }
  return sum;
}

// Whether the columns belong together.
bool Agree(const Columns& c, size_t num) {
  const size_t num_bytes = num * sizeof(int32_t);
  const bool has_text = !c.text_starts.empty() || !c.text_counts.empty();
  return c.chunk_ids.size() == num * sizeof(int64_t) && c.starts.size() == num_bytes &&
         c.counts.size() == num_bytes &&
         (!has_text ||
          (c.text_starts.size() == num_bytes && c.text_counts.size() == num_bytes)) &&
         c.tokens.size() == c.logprobs.size() &&
         c.tokens.size() == Sum(c.counts) * kTokenBytes &&
         c.text.size() == Sum(c.text_counts);
}

template <typename To, typename From>
void Copy(To* to, const From* from, size_t num) {
  static_assert(sizeof(To) == kTokenBytes || sizeof(To) == sizeof(char));
  std::memcpy(to, from, num * sizeof(To));
}

}  // namespace

size_t Outputs::Size() const {
  const std::lock_guard lock(mutex_);
  return outputs_.Size();
}

Handle Outputs::Open() {
  const std::lock_guard lock(mutex_);
  return outputs_.Open({});
}

void Outputs::Close(Handle request) {
  const std::lock_guard lock(mutex_);
  Output& output = Idle(request);
  if (!output.is_shared) {
    outputs_.Close(request);
    return;
  }
  output.is_closed = true;
  output.text = {};
}

void Outputs::Clear(Handle request) {
  const std::lock_guard lock(mutex_);
  Output& output = Idle(request);
  output = {.is_shared = output.is_shared};
}

int64_t Outputs::NumTokens(Handle request) const { return At(request).num_tokens; }

void Outputs::Share(Handle request) {
  const std::lock_guard lock(mutex_);
  Require(!At(request).is_shared, "the request has a reader");
  outputs_[request].is_shared = true;
}

void Outputs::Unshare(Handle request) {
  const std::lock_guard lock(mutex_);
  Output& output = outputs_[request];
  output.is_shared = false;
  if (output.is_closed) outputs_.Close(request);
}

void Outputs::Prefetch(Handle request, size_t start) const {
  const Values* block = outputs_[request].values.At(start);
  if (block) __builtin_prefetch(block->tokens + start % Values::kSize);
}

size_t Outputs::Read(Handle request, size_t start, size_t max_tokens,
                     std::string& out) const {
  const Blocks<Values>& values = outputs_[request].values;
  if (start >= values.Size()) return 0;
  const size_t num = std::min(max_tokens, values.Size() - start);
  values.Read(start, num, [&out](const Values& from, size_t at, size_t, size_t some) {
    out.append(reinterpret_cast<const char*>(from.tokens + at), some * kTokenBytes);
  });
  return num;
}

std::vector<int32_t> Outputs::Tokens(Handle request) const {
  const Output& output = At(request);
  std::vector<int32_t> tokens(static_cast<size_t>(output.num_tokens));
  output.values.Read(0, output.values.Size(),
                     [&tokens](const Values& from, size_t at, size_t i, size_t some) {
                       Copy(tokens.data() + i, from.tokens + at, some);
                     });
  return tokens;
}

std::vector<float> Outputs::Logprobs(Handle request) const {
  const Output& output = At(request);
  std::vector<float> logprobs(static_cast<size_t>(output.num_tokens));
  output.values.Read(0, output.values.Size(),
                     [&logprobs](const Values& from, size_t at, size_t i, size_t some) {
                       Copy(logprobs.data() + i, from.logprobs + at, some);
                     });
  return logprobs;
}

std::string Outputs::Text(Handle request) const {
  const Blocks<Characters>& text = At(request).text;
  std::string bytes(text.Size(), '\0');
  text.Read(0, text.Size(),
            [&bytes](const Characters& from, size_t at, size_t i, size_t some) {
              Copy(bytes.data() + i, from.bytes + at, some);
            });
  return bytes;
}

void Outputs::Begin(int64_t chunk_id, Handle request, int64_t max_tokens) {
  Require(chunk_id >= 0, "a chunk's id is not negative");
  Require(max_tokens >= 0, "a chunk's limit is not negative");
  const std::lock_guard lock(mutex_);
  Output& output = Idle(request);
  size_t row = Find(chunk_id);
  Require(table_[row].chunk_id < 0, "the chunk runs already");
  if (2 * (num_running_ + 1) > table_.size()) {
    Grow();
    row = Find(chunk_id);
  }
  table_[row] = {.chunk_id = chunk_id,
                 .request = request,
                 .first = output.num_tokens,
                 .max_tokens = max_tokens};
  output.runs = true;
  ++num_running_;
}

void Outputs::End(int64_t chunk_id) {
  const std::lock_guard lock(mutex_);
  EndLocked(chunk_id);
}

void Outputs::EndLocked(int64_t chunk_id) {
  size_t free = Find(chunk_id);
  if (chunk_id < 0 || table_[free].chunk_id < 0) return;
  outputs_[table_[free].request].runs = false;
  --num_running_;
  // Rows behind it move up, unless that would put one before the place it is looked
  // for.
  const size_t mask = table_.size() - 1;
  for (size_t next = (free + 1) & mask; table_[next].chunk_id >= 0;
       next = (next + 1) & mask) {
    const size_t home = static_cast<size_t>(table_[next].chunk_id) & mask;
    if (((next - home) & mask) >= ((next - free) & mask)) {
      table_[free] = table_[next];
      free = next;
    }
  }
  table_[free] = {};
}

Outputs::Taken Outputs::Take(const Columns& report, const std::vector<int64_t>& over) {
  const size_t num = report.chunk_ids.size() / sizeof(int64_t);
  const bool agree = Agree(report, num);
  std::vector<uint8_t> is_over(over.empty() ? 0 : num);
  for (const int64_t place : over) {
    if (place >= 0 && static_cast<size_t>(place) < num) {
      is_over[static_cast<size_t>(place)] = 1;
    }
  }
  const std::lock_guard lock(mutex_);
  Prefetch(report.chunk_ids);
  Taken taken;
  const char* tokens = report.tokens.data();
  const char* logprobs = report.logprobs.data();
  const char* text = report.text.data();
  for (size_t i = 0; i < num; ++i) {
    const int64_t chunk_id = ReadAt<int64_t>(report.chunk_ids, i);
    Running& chunk = table_[Find(chunk_id)];
    const bool runs = chunk_id >= 0 && chunk.chunk_id == chunk_id;
    bool follows = false;
    if (agree) {
      const Part part{.start = Int32At(report.starts, i),
                      .count = Int32At(report.counts, i),
                      .text_start = Int32At(report.text_starts, i),
                      .text_count = Int32At(report.text_counts, i),
                      .tokens = tokens,
                      .logprobs = logprobs,
                      .text = text};
      if (runs) {
        const int64_t before = chunk.num_tokens;
        follows = Append(chunk, part);
        taken.num_tokens += chunk.num_tokens - before;
      }
      const auto num_bytes = std::max<int64_t>(0, part.count) * kTokenBytes;
      tokens += num_bytes;
      logprobs += num_bytes;
      text += std::max<int64_t>(0, part.text_count);
    }
    if (runs && !follows) taken.refused.push_back(static_cast<int64_t>(i));
    if (runs && !is_over.empty() && is_over[i]) EndLocked(chunk_id);
  }
  return taken;
}

Outputs::Longest Outputs::LongestRunning() const {
  Longest longest;
  for (const Running& chunk : table_) {
    if (chunk.chunk_id < 0) continue;
    const int64_t num = chunk.first + chunk.num_tokens;
    if (longest.chunk_id < 0 || num > longest.num_tokens ||
        (num == longest.num_tokens && chunk.chunk_id < longest.chunk_id)) {
      longest = {.chunk_id = chunk.chunk_id, .num_tokens = num};
    }
  }
  return longest;
}

const Outputs::Output& Outputs::At(Handle request) const {
  Require(outputs_.IsOpen(request) && !outputs_[request].is_closed,
          "no such request is open");
  return outputs_[request];
}

Outputs::Output& Outputs::Idle(Handle request) {
  Require(!At(request).runs, "a chunk of this request runs");
  return outputs_[request];
}

size_t Outputs::Find(int64_t chunk_id) const {
  const size_t mask = table_.size() - 1;
  size_t row = static_cast<size_t>(chunk_id) & mask;
  while (table_[row].chunk_id >= 0 && table_[row].chunk_id != chunk_id) {
    row = (row + 1) & mask;
  }
  return row;
}

void Outputs::Grow() {
  std::vector<Running> rows(2 * table_.size());
  rows.swap(table_);
  for (const Running& chunk : rows) {
    if (chunk.chunk_id >= 0) table_[Find(chunk.chunk_id)] = chunk;
  }
}

bool Outputs::Append(Running& chunk, const Part& part) {
  const bool follows = part.count >= 0 && part.text_count >= 0 && part.start >= 0 &&
                       part.start <= chunk.num_tokens && part.text_start >= 0 &&
                       part.text_start <= chunk.num_text &&
                       part.start + part.count <= chunk.max_tokens;
  if (!follows) return false;
  Output& output = outputs_[chunk.request];
  const int64_t known = chunk.num_tokens - part.start;
  if (known < part.count) {
    const auto num_new = static_cast<size_t>(part.count - known);
    if (keeps_values_) {
      const char* tokens = part.tokens + known * kTokenBytes;
      const char* logprobs = part.logprobs + known * kTokenBytes;
      output.values.Append(num_new, [=](Values& to, size_t at, size_t i, size_t some) {
        Copy(to.tokens + at, tokens + i * kTokenBytes, some);
        Copy(to.logprobs + at, logprobs + i * kTokenBytes, some);
      });
    }
    chunk.num_tokens += static_cast<int64_t>(num_new);
    output.num_tokens += static_cast<int64_t>(num_new);
  }
  const int64_t known_text = chunk.num_text - part.text_start;
  if (known_text < part.text_count) {
    const auto num_new = static_cast<size_t>(part.text_count - known_text);
    if (keeps_values_) {
      const char* text = part.text + known_text;
      output.text.Append(num_new,
                         [=](Characters& to, size_t at, size_t i, size_t some) {
                           Copy(to.bytes + at, text + i, some);
                         });
    }
    chunk.num_text += static_cast<int64_t>(num_new);
  }
  return true;
}

// Asks for the memory that a report's chunks will touch, all at once: each waits for
// main memory otherwise, three times over.
void Outputs::Prefetch(std::string_view chunk_ids) const {
  const size_t num = chunk_ids.size() / sizeof(int64_t);
  const size_t mask = table_.size() - 1;
  for (size_t i = 0; i < num; ++i) {
    const auto id = static_cast<size_t>(ReadAt<int64_t>(chunk_ids, i));
    __builtin_prefetch(&table_[id & mask], 1);
  }
  for (size_t i = 0; i < num; ++i) {
    const Running& chunk = table_[Find(ReadAt<int64_t>(chunk_ids, i))];
    if (chunk.chunk_id >= 0) __builtin_prefetch(&outputs_[chunk.request], 1);
  }
  for (size_t i = 0; i < num; ++i) {
    const Running& chunk = table_[Find(ReadAt<int64_t>(chunk_ids, i))];
    if (chunk.chunk_id < 0) continue;
    const Output& output = outputs_[chunk.request];
    const size_t num = output.values.Size();
    if (const Values* block = output.values.At(num)) {
      __builtin_prefetch(block->tokens + num % Values::kSize, 1);
      __builtin_prefetch(block->logprobs + num % Values::kSize, 1);
    }
    if (const Characters* block = output.text.At(output.text.Size())) {
      __builtin_prefetch(block->bytes + output.text.Size() % Characters::kSize, 1);
    }
  }
}

}  // namespace aseer
