// The trees of many groups behind batch calls: one call a step for all requests.
//
// Groups and requests are named by handles that are never used twice. Calls are
// serialised by a mutex; none waits on anything else. A handle that is unknown
// throws std::out_of_range, any other bad argument std::invalid_argument, both
// before anything has changed.

#ifndef ASEER_DGDS_FOREST_H_
#define ASEER_DGDS_FOREST_H_

#include <memory>
#include <mutex>
#include <unordered_map>

#include "blend.h"
#include "cst.h"

namespace aseer::dgds {

using Handle = int64_t;

// Row i of a batch is [offsets[i], offsets[i + 1]) of the flat arrays.
struct Drafts {
  std::vector<Token> tokens;
  std::vector<int32_t> parents;    // Of a tree: within the row; -1: follows the text.
  std::vector<float> confidences;  // That the token and those before it are accepted.
  std::vector<int64_t> offsets;
};

// Texts, one a row; the rows are `stride` tokens apart.
struct Table {
  const Token* tokens;
  int64_t num_rows;
  int64_t num_columns;
  int64_t stride;
};

// One order of context of a request, and what followed it.
struct Continuations {
  uint32_t match_length;
  std::vector<Edge> edges;  // In order.
};

class SuffixForest {
 public:
  explicit SuffixForest(uint32_t max_match);

  Handle OpenGroup(std::span<const Token> prompt);
  Handle OpenRequest(Handle group);
  void CloseGroup(Handle group);
  void CloseRequests(std::span<const Handle> requests);

  // Row i continues request i from its token starts[i] (empty: where it ends). What
  // is known already is skipped, and a row that would leave a gap is ignored.
  // Returns the tokens of each request then. Teaches the blend what it drafted.
  std::vector<int64_t> Append(std::span<const Handle> requests,
                              std::span<const Token> tokens,
                              std::span<const int64_t> offsets,
                              std::span<const int64_t> starts);

  // As Append, from a table of texts in which `starts[i]` tokens of row `rows[i]` come
  // before those of request i, and `num_tokens[rows[i]]` are known. Returns how many
  // requests have more tokens than that: texts that have changed.
  int64_t Follow(std::span<const Handle> requests, const Table& table,
                 std::span<const int64_t> rows, std::span<const int64_t> starts,
                 std::span<const int32_t> num_tokens);

  // The most probable continuation of each request, one path a row: at most
  // max_tokens[i] tokens, stopping where the confidence falls below min_confidence.
  // Forecasts are made once: those behind what has come true stay as they are, and are
  // added to, until a token comes that was not forecast.
  Drafts Draft(std::span<const Handle> requests, std::span<const int32_t> max_tokens,
               float min_confidence);
  // As Draft, for the `top_k` most probable paths of each length, which share what
  // they have in common. Teaches nothing.
  Drafts DraftTree(std::span<const Handle> requests,
                   std::span<const int32_t> max_tokens, uint32_t top_k,
                   float min_confidence) const;

  std::vector<Continuations> Inspect(Handle request) const;
  std::vector<Token> Tokens(Handle request, int64_t start) const;
  std::vector<Handle> Requests(Handle group) const;

  size_t num_groups() const;
  size_t num_tokens() const;
  size_t memory_bytes() const;

 private:
  struct Group {
    explicit Group(std::span<const Token> prompt, uint32_t max_match)
        : tree(prompt, max_match) {}
    SuffixTree tree;
    std::vector<Handle> requests;  // In order of opening.
  };
  struct alignas(64) Request {  // A cache line.
    Handle handle = 0;          // 0: closed.
    Group* group = nullptr;
    std::vector<Prediction> forecasts;  // Of tokens that follow its text.
    Context end;                        // Of its text.
    uint32_t slot = 0;
    float recent = 0.5;  // Share of its forecasts that came true, lately.

    Reader reader() const { return {WriterOf(slot), recent}; }
  };
  static_assert(sizeof(Request) == 64);
  // A draft in the making.
  struct Path {
    Path(Request* request, uint32_t tokens_left, double confidence)
        : request(request),
          tree(&request->group->tree),
          orders(request->forecasts.empty() ? request->end
                                            : request->forecasts.back().context),
          tokens_left(tokens_left),
          confidence(confidence) {}
    Request* request;
    const SuffixTree* tree;
    Orders orders;  // Of the context behind the forecasts.
    uint32_t tokens_left;
    double confidence;      // Of all forecasts.
    bool forecast = false;  // That there is a next token.
  };

  Group& group(Handle handle);
  const Group& group(Handle handle) const;
  Request& request(Handle handle);
  const Request& request(Handle handle) const;
  std::span<Request*> Rows(std::span<const Handle> requests);
  void RequireDistinct(std::span<const Handle> requests);
  void Forget(Handle request);
  static void Walk(std::span<Path> paths);
  void Predict(Path& path) const;
  bool Extend(Path& path, double min_confidence) const;
  static Drafts Collect(std::span<Request* const> rows,
                        std::span<const int32_t> max_tokens, double min_confidence);
  void DraftTreeRow(const Request& request, uint32_t max_tokens, uint32_t top_k,
                    double min_confidence, Drafts& drafts) const;
  void AppendRow(Request& request, std::span<const Token> tokens);
  void Learn(Request& request, std::span<const Token> tokens);

  mutable std::mutex mutex_;
  uint32_t max_match_;
  Handle next_handle_ = 1;
  std::unordered_map<Handle, Group> groups_;
  std::vector<Request> requests_;  // By the lower half of their handles.
  std::vector<uint32_t> closed_;   // Of these.
  Blend blend_;
  uint64_t num_batches_ = 0;
  std::vector<uint64_t> batches_;  // The last that drafted for each request.
  std::vector<Request*> rows_;     // Of a call.
  std::vector<Path> paths_;
};

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_FOREST_H_
