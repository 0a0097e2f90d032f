// Random work on a forest under AddressSanitizer and UBSan, checked as it goes:
// what is read back is what was appended, counts agree with a scan of the texts,
// and a forest whose requests are closed is like one that never had them.
//
//   cmake -S . -B build/asan -DASEER_SANITIZE=ON
//   cmake --build build/asan && build/asan/cst_stress [rounds]

#include <cstdio>
#include <cstdlib>
#include <random>

#include "forest.h"

namespace {

using aseer::dgds::Continuations;
using aseer::dgds::Drafts;
using aseer::dgds::Handle;
using aseer::dgds::SuffixForest;
using aseer::dgds::Table;
using aseer::dgds::Token;

void Check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

class Round {
 public:
  explicit Round(uint32_t seed)
      : random_(seed), alphabet_(1 + random_() % 60), forest_(1 + random_() % 32) {
    prompt_ = Text(20);
    group_ = forest_.OpenGroup(prompt_);
  }

  void Run() {
    for (int i = 0; i < 300; ++i) {
      Open();
      Append();
      Draft();
      if (random_() % 16 == 0) Close();
    }
    CheckCounts();
    CheckLikeNew();
    forest_.CloseGroup(group_);
    Check(forest_.num_tokens() == 0, "a closed group leaves no tokens");
  }

 private:
  struct Member {
    Handle handle;
    std::vector<Token> text;
  };

  std::vector<Token> Text(size_t max_size) {
    std::vector<Token> text(random_() % (max_size + 1));
    for (Token& token : text) token = static_cast<Token>(random_() % alphabet_);
    return text;
  }

  Member& Any() { return members_[random_() % members_.size()]; }

  void Open() {
    if (!members_.empty() && random_() % 32 != 0) return;
    members_.push_back({forest_.OpenRequest(group_), {}});
  }

  void Append() {
    Member& member = Any();
    const std::vector<Token> tokens = Text(12);
    const int64_t offsets[] = {0, static_cast<int64_t>(tokens.size())};
    member.text.insert(member.text.end(), tokens.begin(), tokens.end());
    if (random_() % 2 == 0) {
      forest_.Append({&member.handle, 1}, tokens, offsets, {});
    } else {
      Follow(member);
    }
    Check(forest_.Tokens(member.handle, 0) == member.text, "tokens are kept");
  }

  // As an engine does, from a table of several texts, prompts included.
  void Follow(const Member& member) {
    std::vector<Token> text = prompt_;
    text.insert(text.end(), member.text.begin(), member.text.end());
    const auto width = static_cast<int64_t>(text.size());
    const int64_t row = random_() % 3;
    std::vector<Token> table(3 * width, -1);
    std::copy(text.begin(), text.end(), table.begin() + row * width);
    const std::vector<int32_t> num_tokens(3, static_cast<int32_t>(width));
    const auto start = static_cast<int64_t>(prompt_.size());
    const Table texts{table.data(), 3, width, width};
    const int64_t num_lost =
        forest_.Follow({&member.handle, 1}, texts, {&row, 1}, {&start, 1}, num_tokens);
    Check(num_lost == 0, "a text that grows is followed");
  }

  void Draft() {
    const Handle handle = Any().handle;
    const int32_t limit = 8;
    const Drafts path = forest_.Draft({&handle, 1}, {&limit, 1}, 0.05f);
    Check(path.tokens.size() <= 8, "a path is no longer than asked");
    const Drafts tree = forest_.DraftTree({&handle, 1}, {&limit, 1}, 3, 0.05f);
    for (size_t i = 0; i < tree.tokens.size(); ++i) {
      Check(tree.parents[i] < static_cast<int32_t>(i), "parents come first");
    }
  }

  void Close() {
    const size_t i = random_() % members_.size();
    forest_.CloseRequests({&members_[i].handle, 1});
    members_.erase(members_.begin() + static_cast<int64_t>(i));
    Open();
  }

  // The shortest order is the last token alone: count its followers by hand.
  void CheckCounts() {
    const Member& member = Any();
    if (member.text.empty()) return;
    uint32_t expected = 0;
    for (size_t i = 0; i + 1 < prompt_.size(); ++i) {
      expected += prompt_[i] == member.text.back();
    }
    for (const Member& other : members_) {
      Token before = prompt_.empty() ? -1 : prompt_.back();
      for (const Token token : other.text) {
        expected += before == member.text.back();
        before = token;
      }
    }
    uint32_t found = 0;
    const std::vector<Continuations> orders = forest_.Inspect(member.handle);
    if (!orders.empty()) {
      for (const auto& edge : orders.back().edges) found += edge.count;
    }
    Check(found == expected, "counts agree with the texts");
  }

  void CheckLikeNew() {
    SuffixForest fresh(32);
    const Handle group = fresh.OpenGroup(prompt_);
    size_t size = prompt_.size();
    for (const Member& member : members_) {
      const Handle handle = fresh.OpenRequest(group);
      const int64_t offsets[] = {0, static_cast<int64_t>(member.text.size())};
      fresh.Append({&handle, 1}, member.text, offsets, {});
      size += member.text.size();
    }
    Check(fresh.num_tokens() == size && forest_.num_tokens() == size,
          "closed requests are gone");
  }

  std::mt19937 random_;
  uint32_t alphabet_;
  SuffixForest forest_;
  std::vector<Token> prompt_;
  Handle group_ = 0;
  std::vector<Member> members_;
};

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 50;
  for (int seed = 0; seed < rounds; ++seed) Round(static_cast<uint32_t>(seed)).Run();
  std::printf("%d rounds passed\n", rounds);
}
