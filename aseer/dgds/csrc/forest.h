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

  // The most probable continuation of each request, one path a row: at most
  // max_tokens[i] tokens, stopping where the confidence falls below min_confidence.
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
  struct Request {
    Handle handle = 0;  // 0: closed.
    Group* group = nullptr;
    uint32_t slot = 0;
    Reader reader;
    std::vector<Prediction> forecasts;  // Tokens that were predicted and not yet seen.
    uint64_t batch = 0;                 // The last that drafted for it.
  };
  // A draft in the making.
  struct Path {
    Path(Request* request, const Context& context, uint32_t tokens_left)
        : request(request),
          tree(&request->group->tree),
          context(context),
          orders(context),
          tokens_left(tokens_left) {}
    Request* request;
    const SuffixTree* tree;
    Context context;
    Orders orders;  // Of the context.
    uint32_t tokens_left;
    double confidence = 1;
    bool forecast = false;  // That there is a next token.
  };

  Group& group(Handle handle);
  const Group& group(Handle handle) const;
  Request& request(Handle handle);
  const Request& request(Handle handle) const;
  std::vector<Request*> Rows(std::span<const Handle> requests);
  void Forget(Handle request);
  static void Walk(std::span<Path> paths);
  void Forecast(Path& path) const;
  static bool Extend(Path& path, double min_confidence);
  static Drafts Collect(std::span<Request* const> rows, double min_confidence);
  void DraftTreeRow(const Request& request, uint32_t max_tokens, uint32_t top_k,
                    double min_confidence, Drafts& drafts) const;
  void Learn(Request& request, std::span<const Token> tokens);

  mutable std::mutex mutex_;
  uint32_t max_match_;
  Handle next_handle_ = 1;
  uint64_t num_batches_ = 0;
  std::unordered_map<Handle, Group> groups_;
  std::vector<Request> requests_;  // By the lower half of their handles.
  std::vector<uint32_t> closed_;   // Of these.
  Blend blend_;
};

}  // namespace aseer::dgds

#endif  // ASEER_DGDS_FOREST_H_
