// Random work on the waiting orders, the capacity, the prefix caches and the outputs
// under AddressSanitizer and UBSan, checked against plain models that sort and scan.
//
//   cmake -S . -B build/asan -DASEER_SANITIZE=ON
//   cmake --build build/asan && build/asan/core_stress [rounds]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>

#include "fleet.h"
#include "outputs.h"
#include "residency.h"
#include "waiting.h"

namespace {

using aseer::Capacity;
using aseer::Columns;
using aseer::Handle;
using aseer::KvGroup;
using aseer::KvShape;
using aseer::Outputs;
using aseer::PrefixCaches;
using aseer::Rank;
using aseer::WaitingOrders;

void Check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

template <typename Call>
void CheckRefused(Call call, const char* what) {
  try {
    call();
  } catch (const std::logic_error&) {
    return;
  }
  Check(false, what);
}

class Orders {
 public:
  explicit Orders(uint32_t seed) : random_(seed), orders_(1 + random_() % 2) {}

  void Run() {
    for (int step = 0; step < 400; ++step) {
      switch (random_() % 8) {
        case 0:
        case 1:
        case 2:
          Add();
          break;
        case 3:
          if (!waiting_.empty()) Remove(Any()->first);
          break;
        case 4:
          SetLeads();
          break;
        case 5:
          if (random_() % 4 == 0) RemoveGroup();
          break;
        case 6:
          chosen_ = random_() % 2;
          if (chosen_ == 1 && !HasTwo()) chosen_ = 0;
          orders_.Choose(chosen_);
          break;
        default:
          Round();
      }
      Compare();
    }
    while (!waiting_.empty()) Remove(Any()->first);
    Check(orders_.Size() == 0 && orders_.NumGroups() == 0, "nothing is left");
  }

 private:
  struct Waiting {
    int group;
    uint64_t age;
    WaitingOrders::AllRanks ranks;
  };

  bool HasTwo() {
    try {
      orders_.Choose(1);
      orders_.Choose(chosen_);
      return true;
    } catch (const std::invalid_argument&) {
      return false;
    }
  }

  // No two ranks are alike: the last number is only given once.
  Rank NewRank() {
    return {static_cast<int64_t>(random_() % 3), -static_cast<int64_t>(random_() % 5),
            0, static_cast<int64_t>(++num_ranks_)};
  }

  std::map<Handle, Waiting>::iterator Any() {
    auto at = waiting_.begin();
    std::advance(at, random_() % waiting_.size());
    return at;
  }

  void Add() {
    const int group = static_cast<int>(random_() % 12);
    WaitingOrders::AllRanks ranks;
    for (auto& [own, lead] : ranks) own = NewRank(), lead = NewRank();
    const auto found = groups_.find(group);
    const auto [request, of_group] =
        orders_.Add(found == groups_.end() ? -1 : found->second, ranks);
    Check(found == groups_.end() || found->second == of_group, "the group's handle");
    groups_[group] = of_group;
    Check(!waiting_.contains(request), "a handle is given once");
    waiting_[request] = {group, ++num_added_, ranks};
  }

  void Remove(Handle request) {
    const int group = waiting_.at(request).group;
    waiting_.erase(request);
    const bool was_last = std::ranges::none_of(
        waiting_, [&](const auto& item) { return item.second.group == group; });
    Check(orders_.Remove(request) == was_last, "the last one closes its group");
    if (was_last) {
      CheckRefused([&] { orders_.Members(groups_[group]); }, "a closed group");
      groups_.erase(group);
    }
    CheckRefused([&] { orders_.Remove(request); }, "a request is removed once");
  }

  void SetLeads() {
    if (groups_.empty()) return;
    const auto [group, handle] = *groups_.begin();
    std::vector<std::pair<Handle, std::array<Rank, aseer::kMaxOrders>>> leads;
    for (auto& [request, waiting] : waiting_) {
      if (waiting.group != group) continue;
      leads.push_back({request, {NewRank(), NewRank()}});
      for (size_t i = 0; i < aseer::kMaxOrders; ++i) {
        waiting.ranks[i].lead = leads.back().second[i];
      }
    }
    orders_.SetLeads(handle, leads);
    leads.push_back({Handle{1} << 40, {}});
    CheckRefused([&] { orders_.SetLeads(handle, leads); }, "an unknown member");
  }

  void RemoveGroup() {
    if (groups_.empty()) return;
    const auto [group, handle] = *groups_.begin();
    orders_.RemoveGroup(handle);
    std::erase_if(waiting_,
                  [&](const auto& item) { return item.second.group == group; });
    groups_.erase(group);
  }

  // The first of each group, in order.
  std::vector<Handle> FirstOfGroups() const {
    std::map<int, Handle> first;
    for (const auto& [request, waiting] : waiting_) {
      const auto [at, is_new] = first.try_emplace(waiting.group, request);
      const auto& best = waiting_.at(at->second);
      if (!is_new && waiting.ranks[chosen_].own < best.ranks[chosen_].own) {
        at->second = request;
      }
    }
    std::vector<Handle> handles;
    for (const auto& [group, request] : first) handles.push_back(request);
    std::ranges::sort(handles, {}, [&](Handle request) {
      return waiting_.at(request).ranks[chosen_].lead;
    });
    return handles;
  }

  void Round() {
    const std::vector<Handle> expected = FirstOfGroups();
    orders_.BeginRound();
    const int64_t room = 1000;  // more than is ever needed: nothing passes unseen
    for (int i = 0; i < aseer::kMaxPassed; ++i) {
      const bool is_any = static_cast<size_t>(i) < expected.size();
      Check(orders_.First(room) == (is_any ? expected[i] : -1), "the first of a round");
      if (is_any) orders_.PassOver(static_cast<int64_t>(random_() % 1000));
    }
    Check(orders_.First(room) == -1, "a round ends");
    CheckRefused([&] { orders_.PassOver(1); }, "nothing was given");
  }

  void Compare() {
    Check(orders_.Size() == waiting_.size(), "as many wait");
    Check(orders_.NumGroups() == groups_.size(), "as many groups");
    Check(orders_.Head(1000) == FirstOfGroups(), "the order of groups");
    Handle oldest = -1;
    for (const auto& [request, waiting] : waiting_) {
      if (oldest < 0 || waiting.age < waiting_.at(oldest).age) oldest = request;
    }
    Check(orders_.Oldest() == oldest, "the oldest");
  }

  std::mt19937 random_;
  WaitingOrders orders_;
  size_t chosen_ = 0;
  std::map<Handle, Waiting> waiting_;
  std::map<int, Handle> groups_;
  uint64_t num_ranks_ = 0;
  uint64_t num_added_ = 0;
};

class Instances {
 public:
  explicit Instances(uint32_t seed)
      : random_(seed), is_uniform_(random_() % 2), shape_(NewShape()) {}

  void Run() {
    CheckRefused([&] { capacity_.Remove(3); }, "an unknown instance");
    CheckRefused([&] { capacity_.Add(size_t{1} << 40, -1, 0, 1, 1, {}); }, "a wild id");
    CheckRefused([&] { capacity_.Add(0, -1, 0, 1, 1, {.block_size = 0}); }, "no block");
    for (int step = 0; step < 400; ++step) {
      const size_t id = random_() % 9;
      switch (random_() % 6) {
        case 0:
          Toggle(id);
          break;
        case 1:
          if (!running_.empty()) Release(random_() % running_.size());
          break;
        case 2:
          if (random_() % 2) {
            capacity_.HoldNone();
          } else {
            capacity_.HoldFreest();
          }
          capacity_.HoldNone();
          break;
        default:
          Reserve(static_cast<int64_t>(1 + random_() % 40));
      }
      Compare();
    }
  }

 private:
  struct Model {
    int64_t total, max_seqs, pool, node;
    KvShape shape;
    int64_t free, running = 0;
    // Block by block, as an engine takes them.
    int64_t BlocksFor(int64_t tokens) const {
      const int64_t written = tokens + shape.num_lookahead_tokens;
      std::vector<KvGroup> groups = shape.groups;
      if (groups.empty()) groups.push_back({shape.block_size, -1, 0});
      int64_t blocks = 0;
      for (const KvGroup& group : groups) {
        int64_t own = 0;
        while (own * group.block_size < written && own != group.max_blocks) ++own;
        blocks += own + group.num_extra_blocks;
      }
      return blocks;
    }
    bool HasRoom(int64_t tokens) const {
      return running < max_seqs && (!running || free >= BlocksFor(tokens));
    }
  };
  struct Chunk {
    size_t instance;
    int64_t blocks;
    uint64_t life;
  };

  int64_t Number(int64_t most) { return 1 + static_cast<int64_t>(random_()) % most; }

  KvShape NewShape() {
    KvShape shape{.block_size = Number(8), .num_lookahead_tokens = Number(4) - 1};
    for (int64_t i = Number(3) - 1; i > 0; --i) {
      shape.groups.push_back(
          {Number(8), random_() % 2 ? -1 : Number(4), Number(3) - 1});
    }
    return shape;
  }

  void Toggle(size_t id) {
    if (models_.erase(id)) {
      capacity_.Remove(id);
      return;
    }
    const KvShape shape = is_uniform_ ? shape_ : NewShape();
    Model model{Number(60), Number(5), Number(2) - 1, Number(3) - 1, shape, 0};
    model.free = model.total;
    capacity_.Add(id, model.pool, model.node, model.total, model.max_seqs, shape);
    CheckRefused([&] { capacity_.Add(id, -1, 0, 1, 1, {}); }, "it is up already");
    models_[id] = model;
    ++lives_[id];
  }

  void Reserve(int64_t tokens) {
    const bool is_any = capacity_.Select(tokens);
    Check(is_any == std::ranges::any_of(
                        models_, [&](auto& m) { return m.second.HasRoom(tokens); }),
          "whether there is a candidate");
    if (!is_any) {
      CheckRefused([&] { capacity_.LeastLoaded({}, 0); }, "no candidate");
      return;
    }
    Check(tokens <= capacity_.MostTokens(), "the bound on tokens");
    const int64_t least = Least(tokens, [](const Model&) { return true; });
    Check(capacity_.LeastLoaded({}, 0) == least, "the least loaded");
    for (int64_t pool : {0, 1}) {
      const int64_t node = Number(3) - 1;
      const auto is_there = [&](auto& m) { return m.pool == pool && m.node == node; };
      Check(capacity_.LeastLoadedOf(pool, node) == Least(tokens, is_there),
            "and of a pool");
    }
    const std::vector<int64_t> nodes{Number(3) - 1, Number(3) - 1};
    const int64_t slack = Number(3) - 1;
    int64_t near = Least(
        tokens, [&](auto& m) { return m.node == nodes[0] || m.node == nodes[1]; });
    const auto running = [&](int64_t i) {
      return models_.at(static_cast<size_t>(i)).running;
    };
    if (near < 0 || running(near) > running(least) + slack) near = least;
    Check(capacity_.LeastLoaded(nodes, slack) == near, "and on some nodes");
    const auto id = static_cast<size_t>(least);
    Model& model = models_.at(id);
    const int64_t shared = random_() % 3 ? 0 : Number(3);
    const int64_t blocks = capacity_.Reserve(id, tokens, shared);
    Check(blocks == std::max(int64_t{0},
                             std::min(model.BlocksFor(tokens), model.total) - shared),
          "the reserved blocks");
    model.free -= blocks;
    ++model.running;
    running_.push_back({id, blocks, lives_[id]});
    CheckRefused([&] { capacity_.Reserve(id, 1000000, -1000000); }, "beyond capacity");
  }

  void Release(size_t i) {
    const Chunk chunk = running_[i];
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
    const auto found = models_.find(chunk.instance);
    if (found != models_.end() && lives_[chunk.instance] != chunk.life) return;
    capacity_.Release(chunk.instance, chunk.blocks);
    if (found == models_.end()) return;
    found->second.free += chunk.blocks;
    --found->second.running;
  }

  template <typename Predicate>
  int64_t Least(int64_t tokens, const Predicate& is_meant) const {
    int64_t least = -1;
    for (const auto& [id, m] : models_) {
      if (!m.HasRoom(tokens) || !is_meant(m)) continue;
      const auto load = [&](const Model& x) { return std::pair(x.running, -x.free); };
      if (least < 0 || load(m) < load(models_.at(static_cast<size_t>(least)))) {
        least = static_cast<int64_t>(id);
      }
    }
    return least;
  }

  void Compare() const {
    Check(capacity_.Size() == static_cast<int64_t>(models_.size()), "as many are up");
    Check(capacity_.AliveIds().size() == models_.size(), "as many ids");
    for (const auto& [id, model] : models_) {
      Check(capacity_.NumFreeBlocks(id) == model.free && model.free >= 0,
            "free blocks");
      Check(capacity_.NumRunning(id) == model.running, "running chunks");
    }
  }

  std::mt19937 random_;
  bool is_uniform_;
  KvShape shape_;  // of all, if they are uniform
  Capacity capacity_;
  std::map<size_t, Model> models_;
  std::map<size_t, uint64_t> lives_;
  std::vector<Chunk> running_;
};

class Caches {
 public:
  explicit Caches(uint32_t seed) : random_(seed), has_pool_(random_() % 2) {
    if (has_pool_) caches_.SetGranularity(8);
    caches_.SetMovePrice(0.25);
    caches_.SetNodePrice(0.5);
  }

  void Run() {
    CheckRefused([&] { caches_.SetMovePrice(2.0); }, "a price beyond 1");
    CheckRefused([&] { caches_.SetNodePrice(-1.0); }, "a price below 0");
    CheckRefused([&] { caches_.Reserve(77, -1, 1); }, "an unknown instance");
    CheckRefused([&] { caches_.Holders(5); }, "an unknown request");
    for (int step = 0; step < 500; ++step) {
      const auto id = static_cast<int64_t>(random_() % 5);
      switch (random_() % 8) {
        case 0:
          if (models_.erase(id)) {
            caches_.DropInstance(id);
          } else {
            caches_.AddInstance(id, 20, 4, PoolOf(id), NodeOf(id));
            models_[id] = {};
          }
          break;
        case 1:
          if (!requests_.empty())
            Close(static_cast<size_t>(random_() % requests_.size()));
          break;
        case 2:
          requests_.push_back({caches_.Open(), -1, 0, 0});
          break;
        default:
          if (!requests_.empty() && models_.contains(id)) RunChunk(id);
      }
      Compare();
    }
  }

 private:
  struct Entry {
    Handle request;
    int64_t blocks;
  };
  using Model = std::vector<Entry>;  // cached, the oldest first
  struct Known {
    Handle handle;
    int64_t pool;
    int64_t node;
    int64_t num_pooled;
  };

  // Pools that span nodes, nodes with instances of several pools, and one without any.
  static int64_t PoolOf(int64_t id) { return id == 4 ? -1 : id % 2; }
  static int64_t NodeOf(int64_t id) { return id / 2; }

  static void Forget(Model& model, Handle request) {
    std::erase_if(model, [&](const Entry& entry) { return entry.request == request; });
  }

  static void Evict(Model& model, int64_t room) {
    int64_t cached = 0;
    for (const Entry& entry : model) cached += entry.blocks;
    while (!model.empty() && cached > room) {
      cached -= model.front().blocks;
      model.erase(model.begin());
    }
  }

  void RunChunk(int64_t id) {
    Known& request = requests_[random_() % requests_.size()];
    const auto blocks = static_cast<int64_t>(random_() % 12);
    const int64_t tokens = blocks * 4 - static_cast<int64_t>(random_() % 4);
    caches_.Reserve(id, request.handle, blocks);
    Forget(models_[id], request.handle);
    Evict(models_[id], 20 - blocks);
    const int64_t computed = std::max(int64_t{0}, tokens);
    caches_.Release(id, request.handle, blocks, computed);
    if (computed / 4) {
      Forget(models_[id], request.handle);
      models_[id].push_back({request.handle, computed / 4});
    }
    if (has_pool_ && PoolOf(id) >= 0 && computed / 8) {
      request.pool = PoolOf(id);
      request.node = NodeOf(id);
      request.num_pooled = computed / 8 * 8;
    }
    Evict(models_[id], 20);
  }

  void Close(size_t i) {
    const Handle handle = requests_[i].handle;
    caches_.Close(handle);
    for (auto& [id, model] : models_) Forget(model, handle);
    requests_.erase(requests_.begin() + static_cast<std::ptrdiff_t>(i));
    CheckRefused([&] { caches_.Close(handle); }, "a request is closed once");
  }

  void Compare() const {
    for (const Known& request : requests_) {
      const PrefixCaches::Held held = caches_.Holders(request.handle);
      const int64_t near = request.num_pooled * 3 / 4;
      const int64_t far = request.num_pooled / 2;
      Check(held.num_pooled == near && held.num_far == far, "tokens in the pool");
      std::map<int64_t, int64_t> expected;
      for (const auto& [id, model] : models_) {
        for (const Entry& entry : model) {
          const int64_t pooled = NodeOf(id) == request.node ? near : far;
          const bool is_covered = request.num_pooled && PoolOf(id) == request.pool &&
                                  entry.blocks * 4 <= pooled;
          if (entry.request == request.handle && !is_covered) {
            expected[id] = entry.blocks * 4;
          }
        }
      }
      const std::map<int64_t, int64_t> found(held.tokens.begin(), held.tokens.end());
      Check(found == expected, "tokens by instance");
    }
  }

  std::mt19937 random_;
  bool has_pool_;
  PrefixCaches caches_;
  std::map<int64_t, Model> models_;
  std::vector<Known> requests_;
};

// Requests whose chunks report, among reports that are wrong in every way.
class Reports {
 public:
  explicit Reports(uint32_t seed)
      : random_(seed), keeps_values_(random_() % 4 != 0), outputs_(keeps_values_) {}

  void Run() {
    for (int step = 0; step < 400; ++step) {
      switch (random_() % 6) {
        case 0:
          requests_.push_back({.handle = outputs_.Open()});
          break;
        case 1:
          if (!requests_.empty()) Begin(Any());
          break;
        case 2:
          if (!requests_.empty()) End(Any());
          break;
        case 3:
          if (random_() % 4 == 0) Garble();
          break;
        default:
          Report();
      }
      Compare();
    }
  }

 private:
  struct Request {
    Handle handle;
    int64_t chunk_id = -1;
    int64_t max_tokens = 0;
    int64_t num_tokens = 0;  // of the chunk
    int64_t num_text = 0;
    std::vector<int32_t> tokens{};
    std::string text{};
  };
  struct Message {
    std::vector<int64_t> ids{};
    std::vector<int32_t> starts{};
    std::vector<int32_t> counts{};
    std::vector<int32_t> tokens{};
    std::vector<float> logprobs{};
    std::vector<int32_t> text_starts{};
    std::vector<int32_t> text_counts{};
    std::string text{};
  };

  Request& Any() { return requests_[random_() % requests_.size()]; }

  template <typename T>
  static std::string_view View(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
  }

  static Columns ColumnsOf(const Message& m) {
    return {.chunk_ids = View(m.ids),
            .starts = View(m.starts),
            .counts = View(m.counts),
            .tokens = View(m.tokens),
            .logprobs = View(m.logprobs),
            .text_starts = View(m.text_starts),
            .text_counts = View(m.text_counts),
            .text = m.text};
  }

  void Begin(Request& request) {
    const int64_t id = next_id_ += 1 + random_() % 20;
    const int64_t max_tokens = random_() % 40;
    if (request.chunk_id >= 0) {
      const Handle handle = request.handle;
      CheckRefused([&] { outputs_.Begin(id, handle, 1); }, "one chunk at a time");
      CheckRefused([&] { outputs_.Clear(handle); }, "what runs is not cleared");
      CheckRefused([&] { outputs_.Close(handle); }, "what runs is not closed");
      return;
    }
    outputs_.Begin(id, request.handle, max_tokens);
    request.chunk_id = id;
    request.max_tokens = max_tokens;
    request.num_tokens = request.num_text = 0;
  }

  void End(Request& request) {
    outputs_.End(request.chunk_id);
    outputs_.End(request.chunk_id);
    request.chunk_id = -1;
    if (random_() % 4 == 0) {
      outputs_.Clear(request.handle);
      request.tokens.clear();
      request.text.clear();
    } else if (random_() % 3 == 0) {
      outputs_.Close(request.handle);
      std::swap(request, requests_.back());
      requests_.pop_back();
    }
  }

  // Columns of random bytes are taken or refused, and never more than they hold.
  void Garble() {
    std::vector<std::string> columns(8);
    for (std::string& column : columns) {
      column.resize(random_() % 40);
      for (char& byte : column) byte = static_cast<char>(random_() % 3 - 1);
    }
    const Columns report{columns[0], columns[1], columns[2], columns[3],
                         columns[4], columns[5], columns[6], columns[7]};
    Outputs other(true);
    for (int i = 0; i < 20; ++i) other.Begin(i, other.Open(), 1 << 20);
    other.Take(report, {0, -1, 1 << 20});
    Message short_of_tokens;
    for (const Request& request : requests_) {
      if (request.chunk_id < 0) continue;
      short_of_tokens.ids.push_back(request.chunk_id);
      short_of_tokens.starts.push_back(0);
      short_of_tokens.counts.push_back(1);
    }
    const Outputs::Taken taken = outputs_.Take(ColumnsOf(short_of_tokens), {});
    Check(taken.num_tokens == 0, "nothing is taken of columns that do not agree");
    Check(taken.refused.size() == short_of_tokens.ids.size(), "all are refused");
  }

  void Report() {
    Message message;
    std::vector<int64_t> refused;
    std::vector<int64_t> over;
    int64_t num_new = 0;
    const bool has_text = random_() % 2 == 0;
    const size_t num = requests_.empty() ? 0 : random_() % 12;
    for (size_t i = 0; i < num; ++i) {
      Request& request = Any();
      const auto start = static_cast<int32_t>(
          std::max<int64_t>(-1, request.num_tokens + random_() % 4 - 2));
      const auto count = static_cast<int32_t>(random_() % 8) - 1;
      const auto text_start =
          has_text ? static_cast<int32_t>(request.num_text + random_() % 3 - 1) : 0;
      const auto text_count =
          has_text ? static_cast<int32_t>(random_() % 9) - (random_() % 9 == 0) : 0;
      const bool is_known = request.chunk_id >= 0;
      message.ids.push_back(is_known ? request.chunk_id
                                     : -1 - static_cast<int64_t>(random_() % 2));
      message.starts.push_back(start);
      message.counts.push_back(count);
      if (has_text) {
        message.text_starts.push_back(text_start);
        message.text_counts.push_back(text_count);
      }
      const bool follows = start >= 0 && count >= 0 && start <= request.num_tokens &&
                           start + count <= request.max_tokens && text_start >= 0 &&
                           text_count >= 0 && text_start <= request.num_text;
      for (int32_t t = 0; t < count; ++t) {
        const auto token = static_cast<int32_t>(random_() % 1000);
        message.tokens.push_back(token);
        message.logprobs.push_back(-static_cast<float>(token));
        if (is_known && follows && start + t == request.num_tokens) {
          request.tokens.push_back(token);
          ++request.num_tokens;
          ++num_new;
        }
      }
      for (int32_t t = 0; t < text_count; ++t) {
        message.text.push_back(static_cast<char>('a' + random_() % 26));
        if (is_known && follows && text_start + t == request.num_text) {
          request.text.push_back(message.text.back());
          ++request.num_text;
        }
      }
      if (is_known && !follows) refused.push_back(static_cast<int64_t>(i));
      if (random_() % 8 == 0) {
        over.push_back(static_cast<int64_t>(i));
        request.chunk_id = -1;
      }
    }
    const Outputs::Taken taken = outputs_.Take(ColumnsOf(message), over);
    Check(taken.num_tokens == num_new, "new tokens");
    Check(taken.refused == refused, "refused parts");
  }

  void Compare() {
    size_t num_running = 0;
    int64_t most = -1;
    for (const Request& request : requests_) {
      const auto num = static_cast<int64_t>(request.tokens.size());
      Check(outputs_.NumTokens(request.handle) == num, "number of tokens");
      std::vector<int32_t> tokens = outputs_.Tokens(request.handle);
      std::vector<float> logprobs = outputs_.Logprobs(request.handle);
      const std::string text = outputs_.Text(request.handle);
      if (keeps_values_) {
        Check(tokens == request.tokens, "tokens");
        Check(
            std::equal(tokens.begin(), tokens.end(), logprobs.begin(), logprobs.end(),
                       [](int32_t t, float l) { return -static_cast<float>(t) == l; }),
            "logprobs");
        Check(text == request.text, "text");
      } else {
        Check(static_cast<int64_t>(tokens.size()) == num && text.empty(),
              "only counted");
      }
      if (request.chunk_id < 0) continue;
      ++num_running;
      most = std::max(most, num);
    }
    Check(outputs_.Size() == requests_.size(), "open requests");
    Check(outputs_.NumRunning() == num_running, "running chunks");
    const Outputs::Longest longest = outputs_.LongestRunning();
    Check(longest.chunk_id < 0 ? most < 0 : longest.num_tokens == most, "the longest");
  }

  std::mt19937 random_;
  bool keeps_values_;
  Outputs outputs_;
  std::vector<Request> requests_;
  int64_t next_id_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < rounds; ++i) {
    Orders(static_cast<uint32_t>(i)).Run();
    Instances(static_cast<uint32_t>(i)).Run();
    Caches(static_cast<uint32_t>(i)).Run();
    Reports(static_cast<uint32_t>(i)).Run();
  }
  std::printf("%d rounds passed\n", rounds);
}
