// The compressed suffix tree of one group, grown online.
//
// All requests of a group share one prompt, so their texts form a trie: the
// prompt, then a branch per request. The tree answers, for any string u of at
// most `max_match` tokens that occurs in it: which tokens followed u, how often,
// and by whose hand. No string spans two requests.
//
// Representation. A suffix tree grown at the right end by interleaved writers is
// awkward (open leaves of one writer are overtaken by another). We therefore keep
// the suffix tree of the *reversed* texts, whose Weiner links are explicit: also
// known as the suffix automaton. A state is a compressed node (the set of strings
// that occur at the same places, the longest of length `length`), `link` is its
// parent in the tree, and an edge leads to the state of the string one token
// longer. Appending is then a local operation per writer, correct under any
// interleaving, and the links of the running request's state enumerate *all*
// orders of context that matter to a prediction, longest first, without a search.
//
// Cost. At most 2n states and 3n edges for n tokens; about 95 bytes a token on
// text. Append is O(1) amortised for the automaton plus one count for each order
// of context of at most `max_match` tokens (about five on text). A state is half
// a cache line and holds its most frequent edge; further edges lie in a block of
// a pool, whose first kRanked are kept in order of frequency. States with more
// than kScan edges are looked up in a hash index. So are the root's, which have no
// other place: nobody asks how often they were taken. No edge refers to the token log,
// which is kept for replication (deltas) and for Remove, which rebuilds.
//
// The tree is a pure function of the set of logs: the order in which requests
// were appended changes no answer.

#ifndef ASEER_DGDS_CST_H_
#define ASEER_DGDS_CST_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace aseer::dgds {

using Token = int32_t;
using StateId = uint32_t;
using Writers = uint32_t;  // Bit i: request slot i mod 31; bit 31: the prompt.

inline constexpr StateId kRoot = 0;
inline constexpr StateId kNone = UINT32_MAX;
inline constexpr Writers kPromptWriter = Writers{1} << 31;
inline constexpr uint32_t kRanked = 3;  // Edges kept in order of frequency.

inline Writers WriterOf(uint32_t slot) { return Writers{1} << (slot % 31); }

// A continuation of a state's strings. Order: count descending, token ascending.
// As the header of a block of edges, `count` is the number of edges in the block.
struct Edge {
  Token token = -1;
  StateId target = 0;
  uint32_t count = 0;
  Writers writers = 0;
};

inline bool Precedes(const Edge& a, const Edge& b) {
  return a.count != b.count ? a.count > b.count : a.token < b.token;
}

struct alignas(32) State {
  uint32_t length = 0;   // Of its longest string.
  StateId link = kNone;  // State of its longest suffix that occurs elsewhere too.
  uint32_t total = 0;    // Sum of its edges' counts.
  uint32_t block = 0;    // Further edges in the pool; 0: an empty block.
  Edge best;
};
static_assert(sizeof(Edge) == 16 && sizeof(State) == 32);

// A string known to the tree: the suffix of length `length` of the strings in
// `state`. As long as it is not located, a state it links to may be the one whose
// shortest string is not longer: appends split states, and edges lead past it.
struct Context {
  StateId state = kRoot;
  uint32_t length = 0;
  Token last = -1;  // -1: empty.
};

// Positions of edges of states that have too many to scan; of the root's, where they
// lead.
class EdgeIndex {
 public:
  uint32_t Find(StateId state, Token token) const;  // 0: absent.
  uint32_t& At(StateId state, Token token);         // 0 where it was absent.
  size_t memory_bytes() const { return slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    StateId state = kNone;
    Token token = 0;
    uint32_t position = 0;
  };
  size_t Probe(StateId state, Token token) const;
  void Grow();

  std::vector<Slot> slots_;
  size_t size_ = 0;
};

class SuffixTree {
 public:
  // Throws std::invalid_argument unless 1 <= max_match <= 255.
  SuffixTree(std::span<const Token> prompt, uint32_t max_match);

  // A new request at the end of the prompt. Slots of removed requests are reused.
  uint32_t Open();
  // Throws std::invalid_argument on a negative token, before any change.
  void Append(uint32_t slot, std::span<const Token> tokens);
  // Forgets requests as if they had never been: O(tokens that stay).
  void Remove(std::span<const uint32_t> slots);

  const std::vector<Token>& log(uint32_t slot) const { return requests_[slot].log; }
  uint32_t num_requests() const { return num_requests_; }
  size_t num_tokens() const { return num_tokens_; }
  size_t num_states() const { return states_.size(); }
  size_t memory_bytes() const;

  // The last min(max_match, tokens so far) tokens of a request, to be located.
  Context Cursor(uint32_t slot) const {
    const Request& request = requests_[slot];
    const std::vector<Token>& log = request.log.empty() ? prompt_.log : request.log;
    return {request.cursor, std::min(request.num_tokens, max_match_),
            log.empty() ? -1 : log.back()};
  }
  // The context that `edge` leads to from one of `length` tokens, to be located.
  Context Advance(const Edge& edge, uint32_t length) const {
    return {edge.target, std::min(length + 1, max_match_), edge.token};
  }
  // A context's state as the tree is now. O(1) amortised over a request's appends.
  Context Locate(Context context) const {
    while (context.length < states_[context.state].length &&
           states_[states_[context.state].link].length >= context.length) {
      context.state = states_[context.state].link;
    }
    return context;
  }

  // Hints for a batch whose trees are out of cache.
  void PrefetchRequest(uint32_t slot) const { __builtin_prefetch(&requests_[slot]); }
  void PrefetchEnd(uint32_t slot) const {
    const Request& request = requests_[slot];
    __builtin_prefetch(request.log.data() + request.log.size());
    Prefetch(request.tip);
  }
  void Prefetch(StateId id) const { __builtin_prefetch(&states_[id]); }
  void PrefetchEdges(const State& state) const {
    __builtin_prefetch(&pool_[state.block]);
    __builtin_prefetch(&pool_[state.block] + kRanked - 1);
  }

  const State& state(StateId id) const { return states_[id]; }
  // The edges of a state but the best; the first kRanked - 1 are in order.
  std::span<const Edge> further_edges(const State& state) const {
    const Edge* block = &pool_[state.block];
    return {block + 1, block->count};
  }
  const Edge* Find(StateId id, Token token) const;

 private:
  struct Request {
    bool open = true;
    std::vector<Token> log;
    Writers writer = 0;
    StateId tip = kRoot;      // State of the whole text.
    StateId cursor = kRoot;   // Of its last max_match tokens, before splits.
    uint32_t num_tokens = 0;  // Prompt included.
  };

  void Push(Request& request, Token token);
  StateId Settle(StateId original, StateId& from, uint32_t& position, Token token,
                 Writers writer);
  void MoveCursor(Request& request, Token token);

  StateId AddState(uint32_t length);
  StateId Clone(StateId original, uint32_t length);
  void AddEdge(StateId from, Token token, StateId target, Writers writer);
  void CountAt(StateId from, uint32_t position, Writers writer);
  uint32_t PositionOf(StateId id, Token token) const;
  Edge& EdgeAt(State& state, uint32_t position);
  void Promote(StateId id, uint32_t position);
  void Swap(StateId id, uint32_t a, uint32_t b);
  uint32_t Allocate(uint32_t size_class);
  uint32_t Enlarge(uint32_t block);
  void Rebuild();

  uint32_t max_match_;
  std::vector<State> states_;
  std::vector<Edge> pool_;      // Blocks of 2^k; the first is a header.
  std::vector<uint32_t> free_;  // Free blocks by size class.
  EdgeIndex index_;
  Request prompt_;
  std::vector<Request> requests_;  // By slot.
  uint32_t num_requests_ = 0;
  size_t num_tokens_ = 0;
};

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_CST_H_
