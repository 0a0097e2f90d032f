#include "cst.h"

#include <algorithm>
#include <bit>

#include "require.h"

namespace aseer::dgds {
namespace {

constexpr uint32_t kScan = 15;  // Longest run of edges searched one by one.
constexpr uint32_t kMissing = UINT32_MAX;
// What arrays grow by at least.
constexpr size_t kLogStep = 64;
constexpr size_t kStateStep = 256;
constexpr size_t kEdgeStep = 512;

// The first edge of a block is its header.
uint32_t& BlockSize(Edge& header) { return header.count; }
uint32_t BlockSize(const Edge& header) { return header.count; }
StateId& NextFree(Edge& header) { return header.target; }

// Grows by half rather than by all, as a tree's memory is mostly these arrays; but not
// by little, as a young tree's time would mostly be this.
template <typename T>
void Reserve(std::vector<T>& items, size_t extra, size_t least = 0) {
  if (items.capacity() - items.size() >= extra) return;
  items.reserve(items.size() + std::max({extra, items.size() / 2, least}));
}

}  // namespace

size_t EdgeIndex::Probe(StateId state, Token token) const {
  const size_t mask = slots_.size() - 1;
  const uint64_t key = (uint64_t{state} << 32) | static_cast<uint32_t>(token);
  size_t i = (key * 0x9E3779B97F4A7C15u >> 32) & mask;
  while (slots_[i].state != kNone &&
         (slots_[i].state != state || slots_[i].token != token)) {
    i = (i + 1) & mask;
  }
  return i;
}

uint32_t EdgeIndex::Find(StateId state, Token token) const {
  return slots_.empty() ? 0 : slots_[Probe(state, token)].position;
}

uint32_t& EdgeIndex::At(StateId state, Token token) {
  if (4 * (size_ + 1) > 3 * slots_.size()) Grow();
  Slot& slot = slots_[Probe(state, token)];
  if (slot.state == kNone) {
    slot = {state, token, 0};
    ++size_;
  }
  return slot.position;
}

void EdgeIndex::Grow() {
  std::vector<Slot> old(std::max<size_t>(64, 2 * slots_.size()));
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.state != kNone) slots_[Probe(slot.state, slot.token)] = slot;
  }
}

SuffixTree::SuffixTree(std::span<const Token> prompt, uint32_t max_match)
    : max_match_(max_match) {
  Require(max_match >= 1 && max_match <= 255, "max_match must be in 1..255");
  RequireTokens(prompt);
  prompt_.log.assign(prompt.begin(), prompt.end());
  prompt_.writer = kPromptWriter;
  Rebuild();
}

uint32_t SuffixTree::Open() {
  const auto closed = std::ranges::find(requests_, false, &Request::open);
  const auto slot = static_cast<uint32_t>(closed - requests_.begin());
  if (closed == requests_.end()) requests_.emplace_back();
  requests_[slot] = {.open = true,
                     .log = {},
                     .writer = WriterOf(slot),
                     .tip = prompt_.tip,
                     .cursor = prompt_.cursor,
                     .num_tokens = prompt_.num_tokens};
  ++num_requests_;
  return slot;
}

void SuffixTree::Append(uint32_t slot, std::span<const Token> tokens) {
  RequireTokens(tokens);
  Request& request = requests_[slot];
  Reserve(request.log, tokens.size(), kLogStep);
  for (const Token token : tokens) {
    request.log.push_back(token);
    Push(request, token);
  }
}

void SuffixTree::Remove(std::span<const uint32_t> slots) {
  bool wrote = false;
  for (const uint32_t slot : slots) {
    wrote |= !requests_[slot].log.empty();
    requests_[slot] = {};
    requests_[slot].open = false;
    --num_requests_;
  }
  if (wrote) Rebuild();
}

// Every array is made anew, so that the memory of what was removed is returned.
void SuffixTree::Rebuild() {
  states_ = std::vector<State>();  // Not {}, which would keep the memory.
  pool_ = std::vector<Edge>();
  free_ = std::vector<uint32_t>();
  index_ = EdgeIndex();
  num_tokens_ = 0;
  AddState(0);
  pool_.emplace_back();  // The empty block.
  prompt_.tip = prompt_.cursor = kRoot;
  prompt_.num_tokens = 0;
  for (const Token token : prompt_.log) Push(prompt_, token);
  for (Request& request : requests_) {
    request.tip = prompt_.tip;
    request.cursor = prompt_.cursor;
    request.num_tokens = prompt_.num_tokens;
    for (const Token token : request.log) Push(request, token);
  }
}

size_t SuffixTree::memory_bytes() const {
  size_t bytes = sizeof(*this) + states_.capacity() * sizeof(State) +
                 pool_.capacity() * sizeof(Edge) + index_.memory_bytes() +
                 requests_.capacity() * sizeof(requests_[0]) +
                 prompt_.log.capacity() * sizeof(Token);
  for (const Request& request : requests_) {
    bytes += request.log.capacity() * sizeof(Token);
  }
  return bytes;
}

// One token more for one writer: the online construction of the automaton, with
// every state on the chain of links of the text so far, but the root, counting `token`
// once.
// Blumer et al. 1985 for one text; a state that exists already is reused, which
// makes it right for many.
void SuffixTree::Push(Request& request, Token token) {
  Reserve(states_, 2, kStateStep);
  StateId from = request.tip;
  StateId tip = kNone;
  uint32_t position = kMissing;
  while (from != kRoot && (position = PositionOf(from, token)) == kMissing) {
    if (tip == kNone) tip = AddState(states_[from].length + 1);
    AddEdge(from, token, tip, request.writer);
    from = states_[from].link;
  }
  // Where the longest suffix leads that has been followed by `token` before.
  StateId known = from == kRoot ? index_.Find(kRoot, token)
                                : EdgeAt(states_[from], position).target;
  if (known != kRoot) {
    known = Settle(known, from, position, token, request.writer);
  } else {  // None has been.
    if (tip == kNone) tip = AddState(1);
    index_.At(kRoot, token) = tip;
  }
  if (tip == kNone) {
    tip = known;
  } else {
    states_[tip].link = known;
  }
  if (from != kRoot) {
    // Contexts longer than max_match are never asked for: skip what may be many.
    if (states_[states_[from].link].length >= max_match_) {
      from = Locate({request.cursor, std::min(request.num_tokens, max_match_)}).state;
      position = PositionOf(from, token);
    }
    while (true) {
      CountAt(from, position, request.writer);
      from = states_[from].link;
      if (from == kRoot) break;
      position = PositionOf(from, token);
    }
  }
  request.tip = tip;
  ++num_tokens_;
  MoveCursor(request, token);
}

// Makes `original`, which `from` leads to by its edge at `position`, a state whose
// longest string is the longest of `from` and `token`. If that takes a split, the
// states below `from` that led to it are redirected and counted; `from` and `position`
// are of the next one then.
StateId SuffixTree::Settle(StateId original, StateId& from, uint32_t& position,
                           Token token, Writers writer) {
  const uint32_t length = states_[from].length + 1;
  if (states_[original].length == length) return original;
  const StateId split = Clone(original, length);
  states_[original].link = split;
  while (from != kRoot) {
    State& state = states_[from];
    position = PositionOf(from, token);
    Edge& edge = EdgeAt(state, position);
    if (edge.target != original) return split;
    edge.target = split;
    CountAt(from, position, writer);
    from = state.link;
  }
  StateId& start = index_.At(kRoot, token);
  if (start == original) start = split;
  return split;
}

void SuffixTree::MoveCursor(Request& request, Token token) {
  const uint32_t before = std::min(request.num_tokens, max_match_);
  ++request.num_tokens;
  if (states_[states_[request.tip].link].length < max_match_) {
    request.cursor = request.tip;
    return;
  }
  const Context cursor = Locate({request.cursor, before});
  request.cursor = Locate(Advance(*Find(cursor.state, token), before)).state;
}

uint32_t SuffixTree::PositionOf(StateId id, Token token) const {
  const State& state = states_[id];
  if (state.best.token == token) return 0;
  if (state.block == 0) return kMissing;
  const Edge* block = &pool_[state.block];
  const uint32_t size = BlockSize(block[0]);
  if (size > kScan) {
    const uint32_t position = index_.Find(id, token);
    return position == 0 ? kMissing : position;
  }
  for (uint32_t i = 1; i <= size; ++i) {
    if (block[i].token == token) return i;
  }
  return kMissing;
}

const Edge* SuffixTree::Find(StateId id, Token token) const {
  const uint32_t position = PositionOf(id, token);
  if (position == kMissing) return nullptr;
  const State& state = states_[id];
  return position == 0 ? &state.best : &pool_[state.block + position];
}

Edge& SuffixTree::EdgeAt(State& state, uint32_t position) {
  return position == 0 ? state.best : pool_[state.block + position];
}

StateId SuffixTree::AddState(uint32_t length) {
  Reserve(states_, 1, kStateStep);
  states_.emplace_back().length = length;
  return static_cast<StateId>(states_.size() - 1);
}

StateId SuffixTree::Clone(StateId original, uint32_t length) {
  const StateId id = AddState(length);
  State& clone = states_[id];
  clone = states_[original];
  clone.length = length;
  if (clone.block == 0) return id;
  const uint32_t size = BlockSize(pool_[clone.block]);
  const uint32_t copy = Allocate(std::bit_width(size));
  std::copy_n(&pool_[clone.block], size + 1, &pool_[copy]);
  clone.block = copy;
  for (uint32_t i = 1; size > kScan && i <= size; ++i) {
    index_.At(id, pool_[copy + i].token) = i;
  }
  return id;
}

void SuffixTree::AddEdge(StateId from, Token token, StateId target, Writers writer) {
  State& state = states_[from];
  const Edge edge{token, target, 1, writer};
  ++state.total;
  if (state.best.token < 0) {
    state.best = edge;
    return;
  }
  if (state.block == 0) {
    state.block = Allocate(1);
    BlockSize(pool_[state.block]) = 0;
  }
  uint32_t size = BlockSize(pool_[state.block]) + 1;
  if (std::has_single_bit(size) && size > 1) state.block = Enlarge(state.block);
  BlockSize(pool_[state.block]) = size;
  pool_[state.block + size] = edge;
  if (size > kScan) {
    for (uint32_t i = size == kScan + 1 ? 1 : size; i <= size; ++i) {
      index_.At(from, pool_[state.block + i].token) = i;
    }
  }
  Promote(from, size);
}

void SuffixTree::CountAt(StateId from, uint32_t position, Writers writer) {
  State& state = states_[from];
  Edge& edge = EdgeAt(state, position);
  ++state.total;
  ++edge.count;
  edge.writers |= writer;
  if (position != 0) Promote(from, position);
}

// Moves an edge whose count has grown to its place among the ranked.
void SuffixTree::Promote(StateId id, uint32_t position) {
  State& state = states_[id];
  if (position >= kRanked) {
    if (!Precedes(EdgeAt(state, position), EdgeAt(state, kRanked - 1))) return;
    Swap(id, position, kRanked - 1);
    position = kRanked - 1;
  }
  for (; position > 0 && Precedes(EdgeAt(state, position), EdgeAt(state, position - 1));
       --position) {
    Swap(id, position, position - 1);
  }
}

void SuffixTree::Swap(StateId id, uint32_t a, uint32_t b) {
  State& state = states_[id];
  std::swap(EdgeAt(state, a), EdgeAt(state, b));
  if (BlockSize(pool_[state.block]) <= kScan) return;
  for (const uint32_t position : {a, b}) {
    if (position > 0) index_.At(id, EdgeAt(state, position).token) = position;
  }
}

uint32_t SuffixTree::Allocate(uint32_t size_class) {
  if (size_class < free_.size() && free_[size_class] != 0) {
    const uint32_t block = free_[size_class];
    free_[size_class] = NextFree(pool_[block]);
    return block;
  }
  const size_t length = size_t{1} << size_class;
  Reserve(pool_, length, kEdgeStep);
  pool_.resize(pool_.size() + length);
  return static_cast<uint32_t>(pool_.size() - length);
}

// A block of twice the size with the same edges; the old one is free.
uint32_t SuffixTree::Enlarge(uint32_t block) {
  const uint32_t size = BlockSize(pool_[block]);
  const auto size_class = static_cast<uint32_t>(std::bit_width(size));
  const uint32_t larger = Allocate(size_class + 1);
  std::copy_n(&pool_[block], size + 1, &pool_[larger]);
  if (free_.size() <= size_class) free_.resize(size_class + 1, 0);
  NextFree(pool_[block]) = free_[size_class];
  free_[size_class] = block;
  return larger;
}

}  // namespace aseer::dgds
