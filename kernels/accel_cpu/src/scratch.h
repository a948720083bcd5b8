// Memory that outlives a call, so that the next one need not ask the system for it.
#pragma once

#include <stddef.h>

namespace accel_cpu {

// Memory for one call. Calls that run at once have memory of their own; what one gives back, the next one takes.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const;  // aligned to 64 bytes; nullptr: there is no memory left

 private:
  struct Block;
  Block* block_;
};

}  // namespace accel_cpu
