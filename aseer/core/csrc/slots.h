// Values by dense handles; a closed handle is given again.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace aseer {

using Handle = int64_t;

// What a caller may not say. Thrown before anything has changed.
inline void Require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename Value>
class Slots {
 public:
  size_t Size() const { return values_.size() - free_.size(); }

  bool IsOpen(Handle handle) const {
    return handle >= 0 && static_cast<size_t>(handle) < values_.size() &&
           is_open_[static_cast<size_t>(handle)];
  }

  Handle Open(Value value) {
    if (free_.empty()) {
      values_.push_back(std::move(value));
      is_open_.push_back(1);
      return static_cast<Handle>(values_.size() - 1);
    }
    const Handle handle = free_.back();
    free_.pop_back();
    (*this)[handle] = std::move(value);
    is_open_[static_cast<size_t>(handle)] = 1;
    return handle;
  }

  void Close(Handle handle) {
    (*this)[handle] = Value();
    is_open_[static_cast<size_t>(handle)] = 0;
    free_.push_back(handle);
  }

  // By handle; a closed handle's is as it was made.
  const std::vector<Value>& values() const { return values_; }

  // Of a handle that is known to be open.
  Value& operator[](Handle handle) { return values_[static_cast<size_t>(handle)]; }
  const Value& operator[](Handle handle) const {
    return values_[static_cast<size_t>(handle)];
  }

 private:
  std::vector<Value> values_;
  std::vector<uint8_t> is_open_;
  std::vector<Handle> free_;
};

}  // namespace aseer
