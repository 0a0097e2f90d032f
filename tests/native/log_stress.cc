// Random work on the token log under AddressSanitizer and UBSan: texts of its own and
// texts that requests write meanwhile on another thread, and questions from strangers.
//
//   cmake -S . -B build/asan -DASEER_SANITIZE=ON
//   cmake --build build/asan && build/asan/log_stress [rounds]

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "outputs.h"
#include "packed.h"
#include "token_log.h"

namespace {

using aseer::Columns;
using aseer::Handle;
using aseer::Outputs;
using aseer::TokenLog;

void Check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

template <typename T>
std::string_view View(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

std::string Text(const std::string& text) {
  return static_cast<char>(0xa0 | text.size()) + text;
}

class Logs {
 public:
  explicit Logs(uint32_t seed) : random_(seed) {}

  void Run() {
    Write();
    for (int step = 0; step < 300; ++step) {
      switch (random_() % 8) {
        case 0:
          log_.Append(Group(), Request(), random_() % 8, Bytes(4 * (random_() % 9)), 0);
          break;
        case 1:
          log_.Register(Group(), "key", 1.0 + random_() % 9, step);
          break;
        case 2:
          log_.Finish(Group());
          break;
        case 3:
          log_.Expire(step - 5.0);
          break;
        default:
          Ask();
      }
    }
    writer_.join();
    for (int i = 0; i < kNumGroups; ++i) log_.Finish("g" + std::to_string(i));
    Check(log_.Size() == 0, "nothing is left");
    Check(outputs_->Size() == 0, "what is closed and not followed is gone");
  }

 private:
  static constexpr int kNumGroups = 4;
  static constexpr int kNumFollowed = 6;

  std::string Group() { return "g" + std::to_string(random_() % kNumGroups); }
  std::string Request() { return "r" + std::to_string(random_() % 8); }
  std::string Bytes(size_t size) {
    std::string bytes(size, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random_());
    return bytes;
  }

  // Requests that report on a thread of their own, and are over at its end.
  void Write() {
    std::vector<Handle> handles;
    for (int i = 0; i < kNumFollowed; ++i) {
      handles.push_back(outputs_->Open());
      outputs_->Share(handles.back());
      log_.Follow(Group(), "f" + std::to_string(i), outputs_, handles.back(), 0);
      outputs_->Begin(i, handles.back(), 1 << 20);
    }
    writer_ = std::thread([this, handles] {
      const std::vector<int64_t> ids{0, 1, 2, 3, 4, 5};
      const std::vector<int32_t> counts(kNumFollowed, 3);
      const std::vector<int32_t> tokens(3 * kNumFollowed, 7);
      for (int32_t step = 0; step < 100; ++step) {
        const std::vector<int32_t> starts(kNumFollowed, 3 * step);
        const Columns report{.chunk_ids = View(ids),
                             .starts = View(starts),
                             .counts = View(counts),
                             .tokens = View(tokens),
                             .logprobs = View(tokens),
                             .text_starts = {},
                             .text_counts = {},
                             .text = {}};
        outputs_->Take(report, {});
      }
      for (int i = 0; i < kNumFollowed; ++i) {
        outputs_->End(i);
        outputs_->Close(handles[static_cast<size_t>(i)]);
      }
    });
  }

  void Ask() {
    std::string question(1, static_cast<char>(0x80 | kNumGroups));
    for (int g = 0; g < kNumGroups; ++g) {
      question += Text("g" + std::to_string(g)) + static_cast<char>(0x82);
      question += Text(Request()) + static_cast<char>(random_() % 128);
      question += Text("f0") + static_cast<char>(random_() % 128);
    }
    Check(log_.Fetch(question, 0).size() >= 5, "an answer is an array");
    for (int i = 0; i < 8; ++i) {
      std::string bad = random_() % 4 == 0 ? Bytes(random_() % 40) : question;
      if (!bad.empty()) bad[random_() % bad.size()] = static_cast<char>(random_());
      bad.resize(random_() % (bad.size() + 1));
      try {
        log_.Fetch(bad, 0);
      } catch (const std::invalid_argument&) {
      }
    }
  }

  std::mt19937 random_;
  std::shared_ptr<Outputs> outputs_ = std::make_shared<Outputs>(true);
  TokenLog log_;
  std::thread writer_;
};

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < rounds; ++i) Logs(static_cast<uint32_t>(i)).Run();
  std::printf("%d rounds passed\n", rounds);
}
