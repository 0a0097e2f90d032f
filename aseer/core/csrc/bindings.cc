#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <utility>

#include "fleet.h"
#include "outputs.h"
#include "residency.h"
#include "token_log.h"
#include "waiting.h"

// Every call takes well under a microsecond, or up to some milliseconds for a whole
// group's requests, and keeps the GIL, but two, which take longer. Arguments are
// converted before a call begins and results after it has ended, so that no Python code
// runs while anything is half done.

namespace nb = nanobind;
using namespace nb::literals;

namespace aseer {
namespace {

Rank ToRank(PyObject* given) {
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) > 4) {
    throw nb::value_error("a rank is a tuple of at most 4 whole numbers");
  }
  Rank rank{};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    if (!nb::try_cast(nb::handle(PyTuple_GET_ITEM(given, i)), rank[i])) {
      throw nb::value_error("a rank's numbers are whole and have at most 64 bits");
    }
  }
  return rank;
}

std::array<Rank, kMaxOrders> ToRanks(const nb::list& by_order) {
  std::array<Rank, kMaxOrders> ranks{};
  if (by_order.size() > ranks.size()) throw nb::value_error("a rank for each order");
  for (size_t i = 0; i < by_order.size(); ++i) ranks[i] = ToRank(by_order[i].ptr());
  return ranks;
}

std::pair<Handle, Handle> Add(WaitingOrders& orders, Handle group, const nb::list& own,
                              const nb::list& lead) {
  const auto among_siblings = ToRanks(own);
  const auto of_group = ToRanks(lead);
  WaitingOrders::AllRanks ranks;
  for (size_t i = 0; i < kMaxOrders; ++i) ranks[i] = {among_siblings[i], of_group[i]};
  return orders.Add(group, ranks);
}

using GroupNumbers = std::tuple<int64_t, int64_t, int64_t>;

void AddInstance(Capacity& capacity, size_t instance, int64_t pool, int64_t node,
                 int64_t num_kv_blocks, int64_t block_size,
                 int64_t num_lookahead_tokens, int64_t max_num_seqs,
                 const std::vector<GroupNumbers>& kv_groups) {
  KvShape shape{.block_size = block_size, .num_lookahead_tokens = num_lookahead_tokens};
  for (const auto& [size, max_blocks, num_extra_blocks] : kv_groups) {
    shape.groups.push_back({size, max_blocks, num_extra_blocks});
  }
  capacity.Add(instance, pool, node, num_kv_blocks, max_num_seqs, std::move(shape));
}

void SetLeads(WaitingOrders& orders, Handle group, const nb::dict& leads) {
  std::vector<std::pair<Handle, std::array<Rank, kMaxOrders>>> converted;
  converted.reserve(leads.size());
  for (const auto& [request, ranks] : leads) {
    converted.emplace_back(nb::cast<Handle>(request),
                           ToRanks(nb::cast<nb::list>(ranks)));
  }
  orders.SetLeads(group, converted);
}

std::string_view View(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

template <typename Number>
nb::bytes ToBytes(const std::vector<Number>& numbers) {
  return nb::bytes(numbers.data(), numbers.size() * sizeof(Number));
}

std::pair<int64_t, std::vector<int64_t>> Take(
    Outputs& outputs, const nb::bytes& chunk_ids, const nb::bytes& starts,
    const nb::bytes& counts, const nb::bytes& tokens, const nb::bytes& logprobs,
    const nb::bytes& text_starts, const nb::bytes& text_counts, const nb::bytes& text,
    const std::vector<int64_t>& over) {
  const Columns report{.chunk_ids = View(chunk_ids),
                       .starts = View(starts),
                       .counts = View(counts),
                       .tokens = View(tokens),
                       .logprobs = View(logprobs),
                       .text_starts = View(text_starts),
                       .text_counts = View(text_counts),
                       .text = View(text)};
  Outputs::Taken taken = outputs.Take(report, over);
  return {taken.num_tokens, std::move(taken.refused)};
}

std::pair<int64_t, int64_t> LongestRunning(Outputs& outputs) {
  const nb::gil_scoped_release release;
  const Outputs::Longest longest = outputs.LongestRunning();
  return {longest.chunk_id, longest.num_tokens};
}

nb::object Untracked(nb::object value) {
  if (PyObject_IS_GC(value.ptr()) && PyObject_GC_IsTracked(value.ptr())) {
    PyObject_GC_UnTrack(value.ptr());
  }
  return value;
}

nb::bytes ToBytes(const std::string& bytes) {
  return nb::bytes(bytes.data(), bytes.size());
}

nb::bytes Fetch(TokenLog& log, const nb::bytes& counts, double now) {
  std::string answer;
  {
    const nb::gil_scoped_release release;
    answer = log.Fetch(View(counts), now);
  }
  return ToBytes(answer);
}

nb::tuple Finish(TokenLog& log, std::string_view group) {
  const TokenLog::Finished finished = log.Finish(group);
  nb::dict texts;
  for (const auto& [request, tokens] : finished.texts) {
    texts[nb::str(request.data(), request.size())] = ToBytes(tokens);
  }
  return nb::make_tuple(ToBytes(finished.prompt_key), texts);
}

nb::tuple Holders(const PrefixCaches& caches, Handle request) {
  const PrefixCaches::Held held = caches.Holders(request);
  nb::dict tokens;
  for (const auto& [instance, num] : held.tokens) tokens[nb::int_(instance)] = num;
  return nb::make_tuple(tokens, held.num_pooled, held.pool, held.num_far, held.node);
}

}  // namespace
}  // namespace aseer

NB_MODULE(_native, m) {
  using aseer::Capacity;
  using aseer::Handle;
  using aseer::Outputs;
  using aseer::PrefixCaches;
  using aseer::TokenLog;
  using aseer::WaitingOrders;

  // An engine that is still open when its program ends keeps these; that is no leak.
  nb::set_leak_warnings(false);

  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const std::out_of_range& missing) {
      PyErr_SetString(PyExc_KeyError, missing.what());
    } catch (const std::invalid_argument& invalid) {
      PyErr_SetString(PyExc_ValueError, invalid.what());
    } catch (const std::logic_error& broken) {
      PyErr_SetString(PyExc_AssertionError, broken.what());
    }
  });

  m.attr("MAX_PASSED") = aseer::kMaxPassed;
  m.attr("DEFAULT_MOVE_PRICE") = aseer::kMovePrice;

  nb::class_<WaitingOrders>(m, "WaitingOrders")
      .def(nb::init<size_t>(), "num_orders"_a)
      .def("__len__", &WaitingOrders::Size)
      .def_prop_ro("num_groups", &WaitingOrders::NumGroups)
      .def_prop_ro("num_passed", &WaitingOrders::NumPassed)
      .def("add", &aseer::Add, "group"_a, "own"_a, "lead"_a)
      .def("set_leads", &aseer::SetLeads, "group"_a, "leads"_a)
      .def("remove", &WaitingOrders::Remove, "request"_a)
      .def("members", &WaitingOrders::Members, "group"_a)
      .def("remove_group", &WaitingOrders::RemoveGroup, "group"_a)
      .def("choose", &WaitingOrders::Choose, "order"_a)
      .def("oldest", &WaitingOrders::Oldest)
      .def("head", &WaitingOrders::Head, "num_groups"_a)
      .def("begin_round", &WaitingOrders::BeginRound)
      .def("first", &WaitingOrders::First, "room"_a)
      .def("pass_over", &WaitingOrders::PassOver, "needs"_a);

  nb::class_<Capacity>(m, "Capacity")
      .def(nb::init<>())
      .def("__len__", &Capacity::Size)
      .def_prop_ro("block_size", &Capacity::BlockSize)
      .def_prop_ro("num_lookahead_tokens", &Capacity::NumLookaheadTokens)
      .def("alive_ids", &Capacity::AliveIds)
      .def("add_instance", &aseer::AddInstance, "instance_id"_a, nb::kw_only(),
           "pool"_a, "node"_a, "num_kv_blocks"_a, "block_size"_a,
           "num_lookahead_tokens"_a, "max_num_seqs"_a, "kv_groups"_a)
      .def("remove", &Capacity::Remove, "instance_id"_a)
      .def("reserve", &Capacity::Reserve, "instance_id"_a, "num_tokens"_a,
           "num_shared_blocks"_a = 0)
      .def("release", &Capacity::Release, "instance_id"_a, "num_blocks"_a)
      .def("num_running", &Capacity::NumRunning, "instance_id"_a)
      .def("num_free_blocks", &Capacity::NumFreeBlocks, "instance_id"_a)
      .def("pool_of", &Capacity::PoolOf, "instance_id"_a)
      .def("node_of", &Capacity::NodeOf, "instance_id"_a)
      .def("set_pool", &Capacity::SetPool, "instance_id"_a, "pool"_a)
      .def("most_tokens", &Capacity::MostTokens)
      .def("select", &Capacity::Select, "num_tokens"_a)
      .def("select_alive", &Capacity::SelectAlive)
      .def("fits", &Capacity::Fits, "instance_id"_a, "num_tokens"_a,
           "num_shared_blocks"_a = 0)
      .def("is_selected", &Capacity::IsSelected, "instance_id"_a)
      .def("least_loaded", &Capacity::LeastLoaded, "nodes"_a = std::vector<int64_t>{},
           "slack"_a = 0)
      .def("least_loaded_of", &Capacity::LeastLoadedOf, "pool"_a, "node"_a = 0)
      .def("hold_none", &Capacity::HoldNone)
      .def("hold_freest", &Capacity::HoldFreest);

  m.def("untracked", &aseer::Untracked, "value"_a);

  nb::class_<Outputs>(m, "Outputs")
      .def(nb::init<bool>(), nb::kw_only(), "keeps_values"_a = true)
      .def("__len__", &Outputs::Size)
      .def_prop_ro("num_running", &Outputs::NumRunning)
      .def("open", &Outputs::Open)
      .def("close", &Outputs::Close, "request"_a)
      .def("clear", &Outputs::Clear, "request"_a)
      .def("share", &Outputs::Share, "request"_a)
      .def("num_tokens", &Outputs::NumTokens, "request"_a)
      .def(
          "tokens",
          [](const Outputs& o, Handle r) { return aseer::ToBytes(o.Tokens(r)); },
          "request"_a)
      .def(
          "logprobs",
          [](const Outputs& o, Handle r) { return aseer::ToBytes(o.Logprobs(r)); },
          "request"_a)
      .def(
          "text", [](const Outputs& o, Handle r) { return aseer::ToBytes(o.Text(r)); },
          "request"_a)
      .def("begin", &Outputs::Begin, "chunk_id"_a, "request"_a, "max_tokens"_a)
      .def("end", &Outputs::End, "chunk_id"_a)
      .def("take", &aseer::Take, "chunk_ids"_a, "starts"_a, "counts"_a, "tokens"_a,
           "logprobs"_a, "text_starts"_a, "text_counts"_a, "text"_a, "over"_a)
      .def("longest_running", &aseer::LongestRunning);

  nb::class_<TokenLog>(m, "TokenLog")
      .def(nb::init<>())
      .def("__len__", &TokenLog::Size)
      .def("__contains__", &TokenLog::Has, "group"_a)
      .def("follow", &TokenLog::Follow, "group"_a, "request"_a, "outputs"_a, "handle"_a,
           "now"_a)
      .def(
          "append",
          [](TokenLog& log, std::string_view group, std::string_view request,
             int64_t start, const nb::bytes& tokens, double now) {
            log.Append(group, request, start, aseer::View(tokens), now);
          },
          "group"_a, "request"_a, "start"_a, "tokens"_a, "now"_a)
      .def(
          "register",
          [](TokenLog& log, std::string_view group, const nb::bytes& prompt_key,
             double ttl_s, double now) {
            return log.Register(group, aseer::View(prompt_key), ttl_s, now);
          },
          "group"_a, "prompt_key"_a, "ttl_s"_a, "now"_a)
      .def("fetch", &aseer::Fetch, "counts"_a, "now"_a)
      .def("finish", &aseer::Finish, "group"_a)
      .def("expire", &TokenLog::Expire, "now"_a);

  nb::class_<PrefixCaches>(m, "PrefixCaches")
      .def(nb::init<>())
      .def_prop_rw("move_price", &PrefixCaches::MovePrice, &PrefixCaches::SetMovePrice)
      .def_prop_rw("node_price", &PrefixCaches::NodePrice, &PrefixCaches::SetNodePrice)
      .def("set_granularity", &PrefixCaches::SetGranularity, "granularity"_a)
      .def("add_instance", &PrefixCaches::AddInstance, "instance_id"_a, nb::kw_only(),
           "num_blocks"_a, "block_size"_a, "pool"_a, "node"_a)
      .def("set_pool", &PrefixCaches::SetPool, "instance_id"_a, "pool"_a)
      .def("drop_instance", &PrefixCaches::DropInstance, "instance_id"_a)
      .def("open", &PrefixCaches::Open)
      .def("close", &PrefixCaches::Close, "request"_a)
      .def("holders", &aseer::Holders, "request"_a)
      .def("reserve", &PrefixCaches::Reserve, "instance_id"_a, "request"_a,
           "num_blocks"_a)
      .def("release", &PrefixCaches::Release, "instance_id"_a, "request"_a,
           "num_blocks"_a, "num_tokens"_a);
}
