#include "scratch.h"

#include <stdlib.h>

namespace accel_cpu {
namespace {

constexpr size_t kHeader = 64;
constexpr size_t kPage = 4096;
constexpr int kKept = 16;  // blocks that wait for the next call; more calls than this at once free theirs

}  // namespace

struct Scratch::Block {
  size_t size;

  static Block* kept[kKept];
};

Scratch::Block* Scratch::Block::kept[kKept] = {};

Scratch::Scratch(size_t bytes) : block_(nullptr) {
  for (Block*& slot : Block::kept) {
    block_ = __atomic_exchange_n(&slot, nullptr, __ATOMIC_ACQUIRE);
    if (block_ != nullptr) break;
  }
  const size_t size = (bytes + kHeader + kPage - 1) / kPage * kPage;
  if (block_ != nullptr && block_->size >= size) return;
  free(block_);
  block_ = static_cast<Block*>(aligned_alloc(kHeader, size));
  if (block_ != nullptr) block_->size = size;
}

Scratch::~Scratch() {
  if (block_ == nullptr) return;
  for (Block*& slot : Block::kept) {
    Block* empty = nullptr;
    if (__atomic_compare_exchange_n(&slot, &empty, block_, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) return;
  }
  free(block_);
}

char* Scratch::data() const { return block_ == nullptr ? nullptr : reinterpret_cast<char*>(block_) + kHeader; }

}  // namespace accel_cpu
