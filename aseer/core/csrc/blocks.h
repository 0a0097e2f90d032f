// What only grows, in blocks, so that none of it is ever moved: a vector would move a
// long text again and again, and keep more room free than a block.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

namespace aseer {

// Where the next value goes: what an append looks at, apart from the list of blocks.
template <typename Block>
struct Tail {
  size_t size = 0;        // values before it
  Block* last = nullptr;  // the block they end in

  // The next value's place there; a new block's first if it is full.
  size_t At() const { return size % Block::kSize; }
};

// Block: has room for `kSize` values, and may be left as it is made.
template <typename Block>
class Blocks {
 public:
  // Room for more values, a stretch after the other: `write` is given its block, where
  // in the block it begins, which of the new values is its first, and how many it is.
  template <typename Write>
  void Append(Tail<Block>& tail, size_t num, Write write) {
    for (size_t done = 0; done < num;) {
      const size_t at = tail.At();
      if (at == 0) tail.last = blocks_.emplace_back(new Block).get();
      const size_t some = std::min(num - done, Block::kSize - at);
      write(*tail.last, at, done, some);
      done += some;
      tail.size += some;
    }
  }

  // Values that there are, a stretch after the other, as `Append` has them.
  template <typename Take>
  void Read(size_t start, size_t num, Take take) const {
    for (size_t done = 0; done < num;) {
      const size_t at = (start + done) % Block::kSize;
      const size_t some = std::min(num - done, Block::kSize - at);
      take(*blocks_[(start + done) / Block::kSize], at, done, some);
      done += some;
    }
  }

  // The block of a value, if it is there.
  const Block* BlockOf(size_t i) const {
    const size_t block = i / Block::kSize;
    return block < blocks_.size() ? blocks_[block].get() : nullptr;
  }

 private:
  std::vector<std::unique_ptr<Block>> blocks_;
};

}  // namespace aseer
