#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "forest.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace aseer::dgds {
namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<const T> View(const Input<T>& array) {
  return {array.data(), array.size()};
}

// What arrays are made with; looked up once, when the module is loaded, and never
// freed.
struct Numpy {
  nb::handle frombuffer, int32, int64, float32;
  nb::handle dtype(Token) const { return int32; }
  nb::handle dtype(int64_t) const { return int64; }
  nb::handle dtype(float) const { return float32; }
};
Numpy numpy;

// A numpy array [size] of a copy. A batch's arrays are small: the copy takes less than
// to hand over the vector, with an object of its own that owns it.
template <typename T>
nb::object Give(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const char*>(values.data());
  const auto size = static_cast<Py_ssize_t>(values.size() * sizeof(T));
  const auto copy = nb::steal(PyByteArray_FromStringAndSize(bytes, size));
  return numpy.frombuffer(copy, numpy.dtype(T{}));
}

template <typename Call>
auto WithoutGil(Call call) {
  const nb::gil_scoped_release release;
  return call();
}

nb::object Append(SuffixForest& forest, const Input<Handle>& requests,
                  const Input<Token>& tokens, const Input<int64_t>& offsets,
                  const std::optional<Input<int64_t>>& starts) {
  return Give(WithoutGil([&] {
    return forest.Append(View(requests), View(tokens), View(offsets),
                         starts ? View(*starts) : std::span<const int64_t>());
  }));
}

nb::tuple Draft(SuffixForest& forest, const Input<Handle>& requests,
                const Input<int32_t>& max_draft_tokens, float min_confidence) {
  const Drafts drafts = WithoutGil([&] {
    return forest.Draft(View(requests), View(max_draft_tokens), min_confidence);
  });
  return nb::make_tuple(Give(drafts.tokens), Give(drafts.offsets),
                        Give(drafts.confidences));
}

nb::tuple DraftTree(const SuffixForest& forest, const Input<Handle>& requests,
                    const Input<int32_t>& max_draft_tokens, uint32_t top_k,
                    float min_confidence) {
  const Drafts drafts = WithoutGil([&] {
    return forest.DraftTree(View(requests), View(max_draft_tokens), top_k,
                            min_confidence);
  });
  return nb::make_tuple(Give(drafts.tokens), Give(drafts.parents), Give(drafts.offsets),
                        Give(drafts.confidences));
}

nb::list Inspect(const SuffixForest& forest, Handle request) {
  nb::list orders;
  for (const Continuations& order :
       WithoutGil([&] { return forest.Inspect(request); })) {
    nb::list edges;
    for (const Edge& edge : order.edges) {
      edges.append(nb::make_tuple(edge.token, edge.count, edge.writers));
    }
    orders.append(nb::make_tuple(order.match_length, edges));
  }
  return orders;
}

}  // namespace
}  // namespace aseer::dgds

NB_MODULE(_cst, m) {
  using aseer::dgds::Handle;
  using aseer::dgds::Input;
  using aseer::dgds::SuffixForest;
  using aseer::dgds::Token;
  using aseer::dgds::View;
  using Release = nb::call_guard<nb::gil_scoped_release>;

  const nb::object module = nb::module_::import_("numpy");
  const auto dtype = [&](const char* name) { return module.attr("dtype")(name); };
  aseer::dgds::numpy = {nb::object(module.attr("frombuffer")).release(),
                        dtype("int32").release(), dtype("int64").release(),
                        dtype("float32").release()};

  // A draft server that still runs when its program ends keeps one; that is no leak.
  nb::set_leak_warnings(false);

  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const std::out_of_range& missing) {
      PyErr_SetString(PyExc_KeyError, missing.what());
    }
  });

  nb::class_<SuffixForest>(m, "SuffixForest")
      .def(nb::init<uint32_t>(), nb::kw_only(), "max_match"_a)
      .def(
          "open_group",
          [](SuffixForest& forest, const Input<Token>& prompt) {
            const nb::gil_scoped_release release;
            return forest.OpenGroup(View(prompt));
          },
          "prompt"_a)
      .def("open_request", &SuffixForest::OpenRequest, "group"_a, Release())
      .def("close_group", &SuffixForest::CloseGroup, "group"_a, Release())
      .def(
          "close_requests",
          [](SuffixForest& forest, const Input<Handle>& requests) {
            const nb::gil_scoped_release release;
            forest.CloseRequests(View(requests));
          },
          "requests"_a)
      .def("append", &aseer::dgds::Append, "requests"_a, "tokens"_a, "offsets"_a,
           "starts"_a = nb::none())
      .def("draft", &aseer::dgds::Draft, "requests"_a, "max_draft_tokens"_a,
           nb::kw_only(), "min_confidence"_a)
      .def("draft_tree", &aseer::dgds::DraftTree, "requests"_a, "max_draft_tokens"_a,
           nb::kw_only(), "top_k"_a, "min_confidence"_a)
      .def("continuations", &aseer::dgds::Inspect, "request"_a)
      .def(
          "tokens",
          [](const SuffixForest& forest, Handle request, int64_t start) {
            return aseer::dgds::Give(
                aseer::dgds::WithoutGil([&] { return forest.Tokens(request, start); }));
          },
          "request"_a, "start"_a = 0)
      .def(
          "requests",
          [](const SuffixForest& forest, Handle group) {
            return aseer::dgds::Give(
                aseer::dgds::WithoutGil([&] { return forest.Requests(group); }));
          },
          "group"_a)
      .def_prop_ro("num_groups", &SuffixForest::num_groups)
      .def_prop_ro("num_tokens", &SuffixForest::num_tokens)
      .def_prop_ro("memory_bytes", &SuffixForest::memory_bytes);
}
