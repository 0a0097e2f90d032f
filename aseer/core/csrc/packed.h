// MessagePack, as far as questions and answers of draft clients need it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "slots.h"

namespace aseer {

// Reads what a stranger may have written; throws what `Require` throws.
class Unpacker {
 public:
  explicit Unpacker(std::string_view data) : data_(data) {}

  size_t Map() { return Size(Byte(), 0x80, 0x0f, 0xdd); }
  std::string_view Text() {
    const uint8_t tag = Byte();
    const size_t size = tag == 0xd9 ? Number(1) : Size(tag, 0xa0, 0x1f, 0xd9);
    return Bytes(size);
  }
  size_t Count() {
    const uint8_t tag = Byte();
    if (tag < 0x80) return tag;
    Require(tag >= 0xcc && tag <= 0xcf, "a count is a number, and not negative");
    return Number(size_t{1} << (tag - 0xcc));
  }
  bool AtEnd() const { return data_.empty(); }

 private:
  uint8_t Byte() { return static_cast<uint8_t>(Bytes(1)[0]); }
  std::string_view Bytes(size_t size) {
    Require(size <= data_.size(), "the question is cut");
    const std::string_view bytes = data_.substr(0, size);
    data_.remove_prefix(size);
    return bytes;
  }
  size_t Number(size_t num_bytes) {
    size_t number = 0;
    for (const char byte : Bytes(num_bytes)) {
      number = number << 8 | static_cast<uint8_t>(byte);
    }
    return number;
  }
  // Of what is small, in the tag itself; else in two bytes or four that follow, by the
  // tags behind `before`.
  size_t Size(uint8_t tag, uint8_t small, uint8_t mask, uint8_t before) {
    if ((tag & ~mask) == small) return tag & mask;
    Require(tag == before + 1 || tag == before + 2, "the question is not understood");
    return Number(tag == before + 1 ? 2 : 4);
  }

  std::string_view data_;
};

class Packer {
 public:
  std::string& data() { return data_; }

  void Bool(bool value) { Byte(value ? 0xc3 : 0xc2); }
  void Number(uint64_t value) {
    Byte(0xcf);
    BigEndian(value, 8);
  }
  void Text(std::string_view text) {
    Byte(0xdb);
    BigEndian(text.size(), 4);
    data_ += text;
  }
  void SmallMap(size_t size) { Byte(static_cast<uint8_t>(0x80 | size)); }
  void SmallText(std::string_view text) {
    Byte(static_cast<uint8_t>(0xa0 | text.size()));
    data_ += text;
  }
  void SmallArray(size_t size) { Byte(static_cast<uint8_t>(0x90 | size)); }
  // Of a size that is told later; what they return, `SetSize` needs. What bytes are is
  // appended to `data`.
  size_t OpenArray() { return Open(0xdd); }
  size_t OpenBytes() { return Open(0xc6); }
  void SetSize(size_t opened, size_t size) {
    for (size_t i = 0; i < 4; ++i) {
      data_[opened - 1 - i] = static_cast<char>(size >> (8 * i));
    }
  }

 private:
  size_t Open(uint8_t tag) {
    Byte(tag);
    BigEndian(0, 4);
    return data_.size();
  }
  void Byte(uint8_t byte) { data_.push_back(static_cast<char>(byte)); }
  void BigEndian(uint64_t value, size_t num_bytes) {
    for (size_t i = num_bytes; i-- > 0;) Byte(static_cast<uint8_t>(value >> (8 * i)));
  }

  std::string data_;
};

}  // namespace aseer
