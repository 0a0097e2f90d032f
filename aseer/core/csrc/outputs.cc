#include "outputs.h"

#include <algorithm>
#include <bit>
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

template <typename Number>
Number NumberAt(const char* numbers, size_t place) {
  return ReadAt<Number>({numbers, (place + 1) * sizeof(Number)}, place);
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
  output.characters = {};
}

void Outputs::Clear(Handle request) {
  const std::lock_guard lock(mutex_);
  Output& output = Idle(request);
  output = {.is_shared = output.is_shared};
}

int64_t Outputs::NumTokens(Handle request) const {
  return static_cast<int64_t>(At(request).tokens.size);
}

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
  const Values* block = outputs_[request].values.BlockOf(start);
  if (block) __builtin_prefetch(block->of + start % Values::kSize);
}

size_t Outputs::Read(Handle request, size_t start, size_t max_tokens,
                     std::string& out) const {
  const Output& output = outputs_[request];
  if (!keeps_values_ || start >= output.tokens.size) return 0;
  const size_t num = std::min(max_tokens, output.tokens.size - start);
  const size_t before = out.size();
  out.resize(before + num * kTokenBytes);
  char* to = out.data() + before;
  output.values.Read(
      start, num, [to](const Values& from, size_t at, size_t i, size_t some) {
        for (size_t j = 0; j < some; ++j) {
          std::memcpy(to + (i + j) * kTokenBytes, &from.of[at + j].token, kTokenBytes);
        }
      });
  return num;
}

std::vector<int32_t> Outputs::Tokens(Handle request) const {
  const Output& output = At(request);
  std::vector<int32_t> tokens(output.tokens.size);
  output.values.Read(0, keeps_values_ ? tokens.size() : 0,
                     [&tokens](const Values& from, size_t at, size_t i, size_t some) {
                       for (size_t j = 0; j < some; ++j) {
                         tokens[i + j] = from.of[at + j].token;
                       }
                     });
  return tokens;
}

std::vector<float> Outputs::Logprobs(Handle request) const {
  const Output& output = At(request);
  std::vector<float> logprobs(output.tokens.size);
  output.values.Read(0, keeps_values_ ? logprobs.size() : 0,
                     [&logprobs](const Values& from, size_t at, size_t i, size_t some) {
                       for (size_t j = 0; j < some; ++j) {
                         logprobs[i + j] = from.of[at + j].logprob;
                       }
                     });
  return logprobs;
}

std::string Outputs::Text(Handle request) const {
  const Output& output = At(request);
  std::string text(keeps_values_ ? output.text.size : 0, '\0');
  output.characters.Read(
      0, text.size(),
      [&text](const Characters& from, size_t at, size_t i, size_t some) {
        std::memcpy(text.data() + i, from.bytes + at, some);
      });
  return text;
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
  table_[row] = {.chunk_id = chunk_id, .request = request};
  output.chunk_id = chunk_id;
  output.first = output.tokens.size;
  output.first_text = output.text.size;
  output.max_tokens = max_tokens;
  ++num_running_;
  UpdateLongest(output);
}

void Outputs::End(int64_t chunk_id) {
  const std::lock_guard lock(mutex_);
  EndLocked(chunk_id);
}

void Outputs::EndLocked(int64_t chunk_id) {
  size_t free = Find(chunk_id);
  if (chunk_id < 0 || table_[free].chunk_id < 0) return;
  outputs_[table_[free].request].chunk_id = -1;
  --num_running_;
  is_longest_known_ &= chunk_id != longest_.chunk_id;
  // Rows behind it move up, unless that would put one before the place it is looked
  // for.
  const size_t mask = table_.size() - 1;
  for (size_t next = (free + 1) & mask; table_[next].chunk_id >= 0;
       next = (next + 1) & mask) {
    const size_t home = Home(table_[next].chunk_id);
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
    const Running& chunk = table_[Find(chunk_id)];
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
        Output& output = outputs_[chunk.request];
        const size_t before = output.tokens.size;
        follows = Append(output, part);
        taken.num_tokens += static_cast<int64_t>(output.tokens.size - before);
        UpdateLongest(output);
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

Outputs::Longest Outputs::LongestRunning() {
  if (!is_longest_known_) {
    const std::lock_guard lock(mutex_);
    longest_ = {};
    is_longest_known_ = true;
    for (const Output& output : outputs_.values()) {
      if (output.chunk_id >= 0) UpdateLongest(output);
    }
  }
  return longest_;
}

void Outputs::UpdateLongest(const Output& output) {
  const auto num = static_cast<int64_t>(output.tokens.size);
  if (longest_.chunk_id < 0 || num > longest_.num_tokens ||
      (num == longest_.num_tokens && output.chunk_id < longest_.chunk_id)) {
    longest_ = {.chunk_id = output.chunk_id, .num_tokens = num};
  }
}

const Outputs::Output& Outputs::At(Handle request) const {
  Require(outputs_.IsOpen(request) && !outputs_[request].is_closed,
          "no such request is open");
  return outputs_[request];
}

Outputs::Output& Outputs::Idle(Handle request) {
  Require(At(request).chunk_id < 0, "a chunk of this request runs");
  return outputs_[request];
}

// Chunk ids are given in turn: by their lowest bits alone, all rows would be next to
// each other, and an end would have to look at all that follow its own.
size_t Outputs::Home(int64_t chunk_id) const {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
  const int num_bits = std::countr_zero(table_.size());
  return static_cast<uint64_t>(chunk_id) * kGolden >> (64 - num_bits);
}

size_t Outputs::Find(int64_t chunk_id) const {
  const size_t mask = table_.size() - 1;
  size_t row = Home(chunk_id);
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

bool Outputs::Append(Output& output, const Part& part) {
  const auto num_tokens = static_cast<int64_t>(output.tokens.size - output.first);
  const auto num_text = static_cast<int64_t>(output.text.size - output.first_text);
  const bool follows = part.count >= 0 && part.text_count >= 0 && part.start >= 0 &&
                       part.start <= num_tokens && part.text_start >= 0 &&
                       part.text_start <= num_text &&
                       part.start + part.count <= output.max_tokens;
  if (!follows) return false;
  const int64_t known = num_tokens - part.start;
  if (known < part.count) {
    const auto num_new = static_cast<size_t>(part.count - known);
    if (keeps_values_) {
      const char* tokens = part.tokens + known * kTokenBytes;
      const char* logprobs = part.logprobs + known * kTokenBytes;
      output.values.Append(output.tokens, num_new,
                           [=](Values& to, size_t at, size_t i, size_t some) {
                             for (size_t j = 0; j < some; ++j) {
                               to.of[at + j] = {NumberAt<int32_t>(tokens, i + j),
                                                NumberAt<float>(logprobs, i + j)};
                             }
                           });
    } else {
      output.tokens.size += num_new;
    }
  }
  const int64_t known_text = num_text - part.text_start;
  if (known_text < part.text_count) {
    const auto num_new = static_cast<size_t>(part.text_count - known_text);
    if (keeps_values_) {
      const char* text = part.text + known_text;
      output.characters.Append(output.text, num_new,
                               [=](Characters& to, size_t at, size_t i, size_t some) {
                                 std::memcpy(to.bytes + at, text + i, some);
                               });
    } else {
      output.text.size += num_new;
    }
  }
  return true;
}

// Asks for the memory that a report's chunks will touch, all at once: each waits for
// main memory otherwise, three times over.
void Outputs::Prefetch(std::string_view chunk_ids) const {
  const size_t num = chunk_ids.size() / sizeof(int64_t);
  for (size_t i = 0; i < num; ++i) {
    __builtin_prefetch(&table_[Home(ReadAt<int64_t>(chunk_ids, i))], 1);
  }
  for (size_t i = 0; i < num; ++i) {
    const Running& chunk = table_[Find(ReadAt<int64_t>(chunk_ids, i))];
    if (chunk.chunk_id >= 0) __builtin_prefetch(&outputs_[chunk.request], 1);
  }
  for (size_t i = 0; i < num; ++i) {
    const Running& chunk = table_[Find(ReadAt<int64_t>(chunk_ids, i))];
    if (chunk.chunk_id < 0) continue;
    const Output& o = outputs_[chunk.request];
    if (o.tokens.last) __builtin_prefetch(o.tokens.last->of + o.tokens.At(), 1);
    if (o.text.last) __builtin_prefetch(o.text.last->bytes + o.text.At(), 1);
  }
}

}  // namespace aseer
