// What groups have generated, for engines that draft from it: see aseer/dgds/log.py.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "outputs.h"
#include "packed.h"

namespace aseer {

// Groups by id, and the texts of their requests. May be used by several threads.
class TokenLog {
 public:
  struct Finished {
    std::string prompt_key{};
    // By request, int32 as bytes; those without a token are left out.
    std::vector<std::pair<std::string, std::string>> texts{};
  };

  TokenLog() = default;
  ~TokenLog();
  TokenLog(const TokenLog&) = delete;
  TokenLog& operator=(const TokenLog&) = delete;

  size_t Size() const;
  bool Has(std::string_view group) const;

  // The text is what the request generates in `outputs`, which share it; the log gives
  // it back.
  void Follow(std::string_view group, std::string_view request,
              std::shared_ptr<Outputs> outputs, Handle handle, double now);
  // Appends to a text of the log's own; what would leave a gap is ignored.
  void Append(std::string_view group, std::string_view request, int64_t start,
              std::string_view tokens, double now);
  // Ttl: how long a group lives from now on, and after it was last asked for. False =
  // there is no such group.
  bool Register(std::string_view group, std::string_view prompt_key, double ttl_s,
                double now);
  // What each group has beyond what the asking engine has.
  //
  // Counts: MessagePack, tokens that the engine has, by request, by group. Returns the
  // message, `Deltas` in MessagePack.
  std::string Fetch(std::string_view counts, double now);
  // Forgets a group.
  Finished Finish(std::string_view group);
  void Expire(double now);

 private:
  static constexpr Handle kInLog = -1;
  struct Text {
    std::string request;
    Handle handle = kInLog;  // of the group's outputs
    std::string own{};       // the text, unless it is there
  };
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const {
      return std::hash<std::string_view>()(text);
    }
  };
  template <typename Value>
  using ByName = std::unordered_map<std::string, Value, Hash, std::equal_to<>>;
  struct Group {
    double ttl_s;
    double expires_at_s;
    std::string prompt_key{};
    std::shared_ptr<Outputs> outputs{};  // of the group's rollout
    std::vector<Text> texts{};           // in the order in which they came
    ByName<size_t> places{};

    void Touch(double now);
    Text& TextOf(std::string_view request);
    // Before what follows, which reads what requests generate.
    std::unique_lock<std::mutex> Lock() const;
    void Prefetch(const std::vector<size_t>& starts) const;
    // Appends tokens of a text from `start` on; returns how many.
    size_t Read(const Text& text, size_t start, size_t max_tokens,
                std::string& out) const;
  };

  Group& Touched(std::string_view group, double now);
  static void Release(const Group& group);
  // The tokens of each text that an engine says it has, by place.
  static void ReadCounts(const Group* group, Unpacker& asked,
                         std::vector<size_t>& starts);
  // What one group has beyond `starts`, by place, if it is anything; the tokens given.
  static size_t Give(const Group& group, const std::vector<size_t>& starts, size_t room,
                     Packer& answer);

  mutable std::mutex mutex_;
  ByName<Group> groups_;
  size_t last_size_ = 0;  // of an answer; the next is likely to be as long
};

}  // namespace aseer
