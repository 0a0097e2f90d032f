#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "fleet.h"
#include "residency.h"
#include "waiting.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_core, m) {
  using aseer::Fleet;
  using aseer::KvResidency;
  using aseer::WaitingQueue;

  // An engine that is still open when its program ends keeps these; that is no leak.
  nb::set_leak_warnings(false);

  m.attr("MAX_PASSED") = aseer::kMaxPassed;
  m.attr("DEFAULT_MOVE_PRICE") = aseer::kMovePrice;

  nb::class_<WaitingQueue>(m, "WaitingQueue")
      .def(nb::init<nb::callable>(), "rank"_a)
      .def("__len__", &WaitingQueue::Size)
      .def("__contains__", &WaitingQueue::Contains, "request_id"_a)
      .def_prop_ro("num_passed", &WaitingQueue::NumPassed)
      .def("add", &WaitingQueue::Add, "request"_a, "length_estimate"_a)
      .def("set_rank", &WaitingQueue::SetRank, "rank"_a)
      .def("set_length_estimate", &WaitingQueue::SetLengthEstimate, "group_id"_a,
           "length_estimate"_a)
      .def("length_estimate", &WaitingQueue::LengthEstimate, "group_id"_a)
      .def("remove", &WaitingQueue::Remove, "request"_a)
      .def("remove_group", &WaitingQueue::RemoveGroup, "group_id"_a)
      .def("oldest", &WaitingQueue::Oldest)
      .def("head", &WaitingQueue::Head, "num_groups"_a)
      .def("begin_round", &WaitingQueue::BeginRound)
      .def("first", &WaitingQueue::First, "room"_a)
      .def("pass_over", &WaitingQueue::PassOver, "needs"_a);

  nb::class_<Fleet>(m, "Fleet")
      .def(nb::init<>())
      .def("__len__", &Fleet::Size)
      .def_prop_ro("block_size", &Fleet::BlockSize)
      .def_prop_ro("num_lookahead_tokens", &Fleet::NumLookaheadTokens)
      .def("info", &Fleet::Info, "instance_id"_a)
      .def("alive_ids", &Fleet::AliveIds)
      .def("add", &Fleet::Add, "info"_a)
      .def("remove", &Fleet::Remove, "instance_id"_a)
      .def("reserve", &Fleet::Reserve, "instance_id"_a, "num_tokens"_a,
           "num_shared_blocks"_a = 0)
      .def("release", &Fleet::Release, "instance_id"_a, "num_blocks"_a)
      .def("num_running", &Fleet::NumRunning, "instance_id"_a)
      .def("num_free_blocks", &Fleet::NumFreeBlocks, "instance_id"_a)
      .def("most_tokens", &Fleet::MostTokens)
      .def("select", &Fleet::Select, "num_tokens"_a)
      .def("select_alive", &Fleet::SelectAlive)
      .def("fits", &Fleet::Fits, "instance_id"_a, "num_tokens"_a)
      .def("is_selected", &Fleet::IsSelected, "instance_id"_a)
      .def("least_loaded", &Fleet::LeastLoaded)
      .def("hold_none", &Fleet::HoldNone)
      .def("hold_freest", &Fleet::HoldFreest);

  nb::class_<KvResidency>(m, "KvResidency")
      .def(nb::init<>())
      .def_prop_rw("move_price", &KvResidency::MovePrice, &KvResidency::SetMovePrice)
      .def("use_pool", &KvResidency::UsePool, "granularity"_a, "pool_of"_a)
      .def("add_instance", &KvResidency::AddInstance, "instance_id"_a, "num_blocks"_a,
           "block_size"_a)
      .def("drop_instance", &KvResidency::DropInstance, "instance_id"_a)
      .def("holders", &KvResidency::Holders, "request_id"_a)
      .def("reserve", &KvResidency::Reserve, "instance_id"_a, "request_id"_a,
           "num_blocks"_a)
      .def("release", &KvResidency::Release, "instance_id"_a, "request_id"_a,
           "num_blocks"_a, "num_tokens"_a)
      .def("forget", &KvResidency::Forget, "request_id"_a);
}
