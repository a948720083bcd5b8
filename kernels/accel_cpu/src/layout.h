// How a quantised weight lies in memory; packing.py writes it and documents it.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace accel_cpu {

constexpr int kTile = 16;               // outputs whose weights stand side by side: one 64-byte vector of 4 inputs each
constexpr int kPanelTiles = 4;          // tiles that are interleaved input by input
constexpr int kPanel = kTile * kPanelTiles;
constexpr int kStepBytes = 64;          // of a tile: 4 inputs of 16 outputs in 8 bits, or 8 inputs in 4 bits
constexpr int kInputMultiple = 8;       // inputs are padded to it
constexpr int64_t kLineBytes = 64;      // of a cache
constexpr int64_t kMaxInputs = 131072;  // above, 127 * 127 * K leaves int32
constexpr int64_t kMaxOutputs = int64_t{1} << 31;  // above, bytes and numbers of scales may leave int64

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Shape of a packed weight [outputs, inputs]; of a gated one, outputs counts the gate's and the up projection's rows.
struct WeightShape {
  int64_t outputs = 0;  // a multiple of kTile
  int64_t inputs = 0;   // as the model has them
  int bits = 8;
  int64_t block = 0;    // inputs per scale; 0: one scale per output

  int64_t padded_inputs() const { return round_up(inputs, kInputMultiple); }
  int64_t blocks() const { return block == 0 ? 1 : (inputs + block - 1) / block; }
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int tiles(int64_t panel) const {
    const int64_t left = outputs / kTile - panel * kPanelTiles;
    return left < kPanelTiles ? static_cast<int>(left) : kPanelTiles;
  }
  int64_t bytes_per_output() const { return padded_inputs() * bits / 8; }
  int64_t bytes() const { return outputs * bytes_per_output(); }
};

}  // namespace accel_cpu
