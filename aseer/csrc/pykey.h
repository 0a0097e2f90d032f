// Python objects as keys of C++ containers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <unordered_map>

namespace aseer {

namespace nb = nanobind;

struct PyHash {
  size_t operator()(nb::handle key) const {
    const Py_hash_t hash = PyObject_Hash(key.ptr());  // a str keeps its own
    if (hash == -1) throw nb::python_error();
    return static_cast<size_t>(hash);
  }
};

struct PyEqual {
  bool operator()(nb::handle a, nb::handle b) const {
    if (a.is(b)) return true;
    const int equal = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (equal < 0) throw nb::python_error();
    return equal == 1;
  }
};

// The keys are borrowed: a value keeps a reference to its own.
template <typename Value>
using PyMap = std::unordered_map<nb::handle, Value, PyHash, PyEqual>;

}  // namespace aseer
