#include "token_log.h"

#include <algorithm>
#include <limits>

namespace aseer {
namespace {

constexpr size_t kTokenBytes = 4;
// Of a group that no engine has registered yet.
constexpr double kTtlS = 600.0;
// Tokens of an answer, so that none takes long to make or to read.
constexpr size_t kMaxFetched = 65'536;

}  // namespace

TokenLog::~TokenLog() {
  for (auto& [name, group] : groups_) Release(group);
}

size_t TokenLog::Size() const {
  const std::lock_guard lock(mutex_);
  return groups_.size();
}

bool TokenLog::Has(std::string_view group) const {
  const std::lock_guard lock(mutex_);
  return groups_.find(group) != groups_.end();
}

void TokenLog::Follow(std::string_view group, std::string_view request,
                      std::shared_ptr<Outputs> outputs, Handle handle, double now) {
  const std::lock_guard lock(mutex_);
  Group& in = Touched(group, now);
  if (!in.outputs) in.outputs = outputs;
  Text& text = in.TextOf(request);
  if (in.outputs != outputs || text.handle != kInLog) {
    outputs->Unshare(handle);  // the first counts
    return;
  }
  text.handle = handle;
  text.own = {};
}

void TokenLog::Append(std::string_view group, std::string_view request, int64_t start,
                      std::string_view tokens, double now) {
  if (start < 0 || tokens.size() % kTokenBytes != 0) return;
  const std::lock_guard lock(mutex_);
  Text& text = Touched(group, now).TextOf(request);
  const auto begin = static_cast<size_t>(start) * kTokenBytes;
  const size_t known = text.own.size();
  if (text.handle != kInLog || begin > known || begin + tokens.size() <= known) return;
  text.own.append(tokens.substr(known - begin));
}

bool TokenLog::Register(std::string_view group, std::string_view prompt_key,
                        double ttl_s, double now) {
  const std::lock_guard lock(mutex_);
  const auto found = groups_.find(group);
  if (found == groups_.end()) return false;
  found->second.prompt_key = prompt_key;
  found->second.ttl_s = ttl_s;
  found->second.expires_at_s = now + ttl_s;
  return true;
}

std::string TokenLog::Fetch(std::string_view counts, double now) {
  const std::lock_guard lock(mutex_);
  Unpacker asked(counts);
  Packer answer;
  answer.data().reserve(last_size_);
  answer.SmallMap(2);
  answer.SmallText("type");
  answer.SmallText("deltas");
  answer.SmallText("groups");
  size_t room = kMaxFetched;
  size_t num_deltas = 0;
  const size_t deltas = answer.OpenArray();
  std::vector<size_t> starts;
  for (size_t num_groups = asked.Map(); num_groups > 0; --num_groups) {
    const std::string_view name = asked.Text();
    const auto found = groups_.find(name);
    Group* group = found == groups_.end() ? nullptr : &found->second;
    const size_t begin = answer.data().size();
    answer.SmallArray(3);
    answer.Text(name);
    answer.Bool(group != nullptr);
    ReadCounts(group, asked, starts);
    size_t num_given = 0;
    if (group) {
      group->Touch(now);
      num_given = Give(*group, starts, room, answer);
      room -= num_given;
    } else {
      answer.SmallArray(0);
    }
    if (num_given > 0 || !group) {
      ++num_deltas;
    } else {
      answer.data().resize(begin);
    }
  }
  Require(asked.AtEnd(), "the question has more than a map");
  answer.SetSize(deltas, num_deltas);
  last_size_ = answer.data().size();
  return std::move(answer.data());
}

void TokenLog::ReadCounts(const Group* group, Unpacker& asked,
                          std::vector<size_t>& starts) {
  starts.assign(group ? group->texts.size() : 0, 0);
  size_t next = 0;  // most engines name requests in the same order
  for (size_t num = asked.Map(); num > 0; --num) {
    const std::string_view request = asked.Text();
    const size_t count = asked.Count();
    if (!group) continue;
    if (next >= starts.size() || group->texts[next].request != request) {
      const auto place = group->places.find(request);
      if (place == group->places.end()) continue;
      next = place->second;
    }
    starts[next++] = count;
  }
}

size_t TokenLog::Give(const Group& group, const std::vector<size_t>& starts,
                      size_t room, Packer& answer) {
  const auto lock = group.Lock();
  group.Prefetch(starts);
  const size_t requests = answer.OpenArray();
  size_t num_requests = 0;
  size_t num_given = 0;
  for (size_t i = 0; i < starts.size() && num_given < room; ++i) {
    const size_t begin = answer.data().size();
    answer.SmallArray(3);
    answer.Text(group.texts[i].request);
    answer.Number(starts[i]);
    const size_t bytes = answer.OpenBytes();
    const size_t num =
        group.Read(group.texts[i], starts[i], room - num_given, answer.data());
    if (num == 0) {
      answer.data().resize(begin);
      continue;
    }
    answer.SetSize(bytes, num * kTokenBytes);
    num_given += num;
    ++num_requests;
  }
  answer.SetSize(requests, num_requests);
  return num_given;
}

TokenLog::Finished TokenLog::Finish(std::string_view group) {
  const std::lock_guard lock(mutex_);
  Finished finished;
  const auto found = groups_.find(group);
  if (found == groups_.end()) return finished;
  finished.prompt_key = std::move(found->second.prompt_key);
  {
    const auto lock = found->second.Lock();
    for (const Text& text : found->second.texts) {
      std::string tokens;
      constexpr size_t kAll = std::numeric_limits<size_t>::max();
      if (found->second.Read(text, 0, kAll, tokens) == 0) continue;
      finished.texts.emplace_back(text.request, std::move(tokens));
    }
  }
  Release(found->second);
  groups_.erase(found);
  return finished;
}

void TokenLog::Expire(double now) {
  const std::lock_guard lock(mutex_);
  std::erase_if(groups_, [now](const auto& entry) {
    if (entry.second.expires_at_s > now) return false;
    Release(entry.second);
    return true;
  });
}

std::unique_lock<std::mutex> TokenLog::Group::Lock() const {
  return outputs ? outputs->Lock() : std::unique_lock<std::mutex>();
}

// All waits for main memory at once: each takes as long as the rest of a text's work.
void TokenLog::Group::Prefetch(const std::vector<size_t>& starts) const {
  for (const Text& text : texts) {
    if (text.handle != kInLog) outputs->Prefetch(text.handle);
  }
  for (size_t i = 0; i < starts.size(); ++i) {
    if (texts[i].handle != kInLog) outputs->Prefetch(texts[i].handle, starts[i]);
  }
}

size_t TokenLog::Group::Read(const Text& text, size_t start, size_t max_tokens,
                             std::string& out) const {
  if (text.handle != kInLog) return outputs->Read(text.handle, start, max_tokens, out);
  const size_t num_known = text.own.size() / kTokenBytes;
  if (start >= num_known) return 0;
  const size_t num = std::min(max_tokens, num_known - start);
  out.append(text.own, start * kTokenBytes, num * kTokenBytes);
  return num;
}

void TokenLog::Group::Touch(double now) {
  expires_at_s = std::max(expires_at_s, now + ttl_s);
}

TokenLog::Text& TokenLog::Group::TextOf(std::string_view request) {
  const auto [place, is_new] = places.try_emplace(std::string(request), texts.size());
  if (is_new) texts.push_back({.request = place->first});
  return texts[place->second];
}

TokenLog::Group& TokenLog::Touched(std::string_view group, double now) {
  const auto [found, is_new] =
      groups_.try_emplace(std::string(group), Group{.ttl_s = kTtlS, .expires_at_s = 0});
  found->second.Touch(now);
  return found->second;
}

void TokenLog::Release(const Group& group) {
  for (const Text& text : group.texts) {
    if (text.handle != kInLog) group.outputs->Unshare(text.handle);
  }
}

}  // namespace aseer
