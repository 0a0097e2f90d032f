// What only grows, in blocks, so that none of it is ever moved: a vector would move a
// long text again and again, and keep more room free than a block.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

namespace aseer {

// Block: has room for `kSize` values, and may be left as it is made.
template <typename Block>
class Blocks {
 public:
  size_t Size() const { return size_; }

  // Room for more values, a stretch after the other: `write` is given its block, where
  // in the block it begins, which of the new values is its first, and how many it is.
  template <typename Write>
  void Append(size_t num, Write write) {
    for (size_t done = 0; done < num;) {
      const size_t at = size_ % Block::kSize;
      if (at == 0) blocks_.emplace_back(new Block);
      const size_t some = std::min(num - done, Block::kSize - at);
      write(*blocks_.back(), at, done, some);
      done += some;
      size_ += some;
    }
  }

  // Values, a stretch after the other, as `Append` has them.
  template <typename Take>
  void Read(size_t start, size_t num, Take take) const {
    for (size_t done = 0; done < num;) {
      const size_t at = (start + done) % Block::kSize;
      const size_t some = std::min(num - done, Block::kSize - at);
      take(*blocks_[(start + done) / Block::kSize], at, done, some);
      done += some;
    }
  }

  // The block of a value that there is, or of the next one, if it is there.
  const Block* At(size_t i) const {
    const size_t block = i / Block::kSize;
    return block < blocks_.size() ? blocks_[block].get() : nullptr;
  }

 private:
  std::vector<std::unique_ptr<Block>> blocks_;
  size_t size_ = 0;
};

}  // namespace aseer
