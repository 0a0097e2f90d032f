#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <numpy/arrayobject.h>

#include "forest.h"
#include "spend.h"

namespace nb = nanobind;
using namespace nb::literals;

// numpy's own interface takes a fraction of the time that nanobind's general one for
// arrays does, and a batch's arrays are so small that handing them over counts.
namespace aseer::dgds {

template <typename T>
struct Element;
template <>
struct Element<int32_t> {
  static constexpr int kType = NPY_INT32;
  static constexpr auto kName = nb::detail::const_name("int32");
};
template <>
struct Element<int64_t> {
  static constexpr int kType = NPY_INT64;
  static constexpr auto kName = nb::detail::const_name("int64");
};
template <>
struct Element<float> {
  static constexpr int kType = NPY_FLOAT32;
};
template <>
struct Element<double> {
  static constexpr int kType = NPY_FLOAT64;
  static constexpr auto kName = nb::detail::const_name("float64");
};

// An argument: a contiguous array [size], read and not kept.
template <typename T>
struct Input {
  std::span<const T> values;
};

// An argument: a table of texts [num_rows, num_columns], each of them contiguous.
struct TableInput {
  Table table;
};

}  // namespace aseer::dgds

namespace nanobind::detail {

template <typename T>
struct type_caster<aseer::dgds::Input<T>> {
  using Element = aseer::dgds::Element<T>;
  NB_TYPE_CASTER(aseer::dgds::Input<T>, const_name("numpy.ndarray[dtype=") +
                                            Element::kName +
                                            const_name(", shape=(*), order='C']"))

  bool from_python(handle source, uint32_t, cleanup_list*) noexcept {
    if (!PyArray_Check(source.ptr())) return false;
    auto* array = reinterpret_cast<PyArrayObject*>(source.ptr());
    if (PyArray_NDIM(array) != 1 || !PyArray_ISCARRAY_RO(array) ||
        !PyArray_EquivTypenums(PyArray_TYPE(array), Element::kType)) {
      return false;
    }
    value.values = {static_cast<const T*>(PyArray_DATA(array)),
                    static_cast<size_t>(PyArray_DIM(array, 0))};
    return true;
  }
};

template <>
struct type_caster<aseer::dgds::TableInput> {
  NB_TYPE_CASTER(aseer::dgds::TableInput,
                 const_name("numpy.ndarray[dtype=int32, shape=(*, *)]"))

  bool from_python(handle source, uint32_t, cleanup_list*) noexcept {
    using aseer::dgds::Token;
    if (!PyArray_Check(source.ptr())) return false;
    auto* array = reinterpret_cast<PyArrayObject*>(source.ptr());
    if (PyArray_NDIM(array) != 2 || !PyArray_ISBEHAVED_RO(array) ||
        !PyArray_EquivTypenums(PyArray_TYPE(array), NPY_INT32)) {
      return false;
    }
    const npy_intp stride = PyArray_STRIDE(array, 0);
    if (PyArray_STRIDE(array, 1) != sizeof(Token) || stride % sizeof(Token) != 0) {
      return false;
    }
    value.table = {static_cast<const Token*>(PyArray_DATA(array)),
                   PyArray_DIM(array, 0), PyArray_DIM(array, 1),
                   stride / static_cast<npy_intp>(sizeof(Token))};
    return true;
  }
};

}  // namespace nanobind::detail

namespace aseer::dgds {
namespace {

// A numpy array [size] of a copy.
template <typename T>
nb::object Give(const std::vector<T>& values) {
  auto size = static_cast<npy_intp>(values.size());
  PyObject* array = PyArray_SimpleNew(1, &size, Element<T>::kType);
  if (array == nullptr) throw nb::python_error();
  std::copy_n(values.data(), values.size(),
              static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array))));
  return nb::steal(array);
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
    return forest.Append(requests.values, tokens.values, offsets.values,
                         starts ? starts->values : std::span<const int64_t>());
  }));
}

int64_t Follow(SuffixForest& forest, const Input<Handle>& requests,
               const TableInput& texts, const Input<int64_t>& rows,
               const Input<int64_t>& starts, const Input<int32_t>& num_tokens) {
  return WithoutGil([&] {
    return forest.Follow(requests.values, texts.table, rows.values, starts.values,
                         num_tokens.values);
  });
}

nb::tuple Draft(SuffixForest& forest, const Input<Handle>& requests,
                const Input<int32_t>& max_draft_tokens, float min_confidence) {
  const Drafts drafts = WithoutGil([&] {
    return forest.Draft(requests.values, max_draft_tokens.values, min_confidence);
  });
  return nb::make_tuple(Give(drafts.tokens), Give(drafts.offsets),
                        Give(drafts.confidences));
}

nb::tuple DraftTree(const SuffixForest& forest, const Input<Handle>& requests,
                    const Input<int32_t>& max_draft_tokens, uint32_t top_k,
                    float min_confidence) {
  const Drafts drafts = WithoutGil([&] {
    return forest.DraftTree(requests.values, max_draft_tokens.values, top_k,
                            min_confidence);
  });
  return nb::make_tuple(Give(drafts.tokens), Give(drafts.parents), Give(drafts.offsets),
                        Give(drafts.confidences));
}

nb::tuple SpendTokens(const Input<double>& survivals, const Input<int64_t>& offsets,
                      const Input<double>& weights, const Input<double>& step_s,
                      double margin) {
  const Spent spent = WithoutGil([&] {
    return Spend(survivals.values, offsets.values, weights.values, step_s.values,
                 margin);
  });
  return nb::make_tuple(Give(spent.lengths), spent.saved_s);
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
  using Release = nb::call_guard<nb::gil_scoped_release>;

  if (_import_array() < 0) throw nb::python_error();

  // A draft server that still runs when its program ends keeps one; that is no leak.
  nb::set_leak_warnings(false);

  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const std::out_of_range& missing) {
      PyErr_SetString(PyExc_KeyError, missing.what());
    }
  });

  m.def("spend", &aseer::dgds::SpendTokens, "survivals"_a, "offsets"_a, "weights"_a,
        "step_s"_a, "margin"_a);
  nb::class_<SuffixForest>(m, "SuffixForest")
      .def(nb::init<uint32_t>(), nb::kw_only(), "max_match"_a)
      .def(
          "open_group",
          [](SuffixForest& forest, const Input<Token>& prompt) {
            const nb::gil_scoped_release release;
            return forest.OpenGroup(prompt.values);
          },
          "prompt"_a)
      .def("open_request", &SuffixForest::OpenRequest, "group"_a, Release())
      .def("close_group", &SuffixForest::CloseGroup, "group"_a, Release())
      .def(
          "close_requests",
          [](SuffixForest& forest, const Input<Handle>& requests) {
            const nb::gil_scoped_release release;
            forest.CloseRequests(requests.values);
          },
          "requests"_a)
      .def("append", &aseer::dgds::Append, "requests"_a, "tokens"_a, "offsets"_a,
           "starts"_a = nb::none())
      .def("follow", &aseer::dgds::Follow, "requests"_a, "texts"_a, "rows"_a,
           "starts"_a, "num_tokens"_a)
      .def("draft", &aseer::dgds::Draft, "requests"_a, "max_draft_tokens"_a,
           "min_confidence"_a)
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
