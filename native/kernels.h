// The interface between the operators and the instruction sets.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both, G weights of a block, J blocks of a row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_plan.h"

namespace qwen3vl {

constexpr int64_t kTileRows = 16;   // rows of W that a tile holds
constexpr int64_t kPanelRows = 96;  // rows of x that are multiplied together: a multiple of 4, 6, 12 and 16
// How far ahead of its use a weight is fetched into the second level cache: the prefetchers of processors end at a page, and
// the first level has too few places for what the memory can deliver. One thread, one row, 13 MB in pages of 4 KiB on Zen 4,
// into the first level 2 KiB ahead 1.00 ms, into the second 4, 8, 16 KiB ahead 0.88, 0.74, 0.70 ms.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kAlignment = 64;  // bytes: a cache line, and the widest vector

QWEN3VL_SHARED constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
QWEN3VL_SHARED constexpr int64_t align_up(int64_t value, int64_t by) { return divide_up(value, by) * by; }

// W [N, K] in few bits, as docs/cpu_kernels.md describes the tiles:
// w(n, k) = unit * scale(n, block of k) * (code(n, k) - zero_point(n, block of k)).
struct Weight {
  const uint8_t* tiles;
  int64_t num_rows;     // N
  int64_t num_columns;  // K
  int32_t bits;         // 4 or 8
  int32_t block;        // G: 32, 64, 128 or 256

  QWEN3VL_SHARED int64_t num_blocks() const { return divide_up(num_columns, block); }
  QWEN3VL_SHARED int64_t num_tiles() const { return divide_up(num_rows, kTileRows); }
  QWEN3VL_SHARED int64_t padded_columns() const { return num_blocks() * block; }
  QWEN3VL_SHARED int64_t block_bytes() const { return kTileRows * block * bits / 8; }
  QWEN3VL_SHARED int64_t tile_bytes() const {
    return align_up(num_blocks() * (block_bytes() + kTileRows * 3) + int64_t{sizeof(float)}, kAlignment);
  }
};

// One tile of a weight.
struct Tile {
  const uint8_t* codes;        // [J, block_bytes]
  const uint16_t* scales;      // float16 [J, 16]
  const uint8_t* zero_points;  // [J, 16]
  float unit;

  QWEN3VL_SHARED Tile(const Weight& weight, int64_t index) {
    codes = weight.tiles + index * weight.tile_bytes();
    const int64_t num_blocks = weight.num_blocks();
    const uint8_t* rest = codes + num_blocks * weight.block_bytes();
    scales = reinterpret_cast<const uint16_t*>(rest);
    zero_points = rest + num_blocks * kTileRows * 2;
    __builtin_memcpy(&unit, zero_points + num_blocks * kTileRows, sizeof unit);
  }
};

// What is multiplied: rows of x; or RMSNorm(x) with weights `norm`; or silu(gate) * up of rows [gate, up].
struct Source {
  const float* x;       // [M, K], gated [M, 2 K]
  const float* norm;    // [K] or null
  float epsilon;        // of the norm
  bool gated;
  int64_t num_columns;  // K

  QWEN3VL_SHARED const float* row(int64_t index) const { return x + index * (gated ? 2 * num_columns : num_columns); }
};

// Up to kPanelRows rows of a source, each block of a row rounded to 8 bits by a scale of its own.
struct Panel {
  int8_t* codes;     // [J, rows, G], -127 ... 127
  float* scales;     // [J, rows]; NaN for a block with an element that is not finite
  float* sums;       // [J, rows]: sum of the codes, a whole number
  int64_t num_rows;
};

// Where a product goes: y(m, n) = product + bias(n) + residual(m, n).
struct Output {
  float* y;               // [M, N]
  const float* bias;      // [N] or null
  const float* residual;  // [M, N] or null
};

// What one instruction set computes with. All functions run on the calling thread.
struct Kernels {
  const char* name;

  // Round rows first_row ... first_row + num_rows - 1 of `source` into rows panel_row ... of `panel`, by the blocks of
  // `weight`; `scratch` has room for weight.padded_columns() floats.
  void (*quantize)(const Source& source, int64_t first_row, const Weight& weight, const Panel& panel,
                   int64_t panel_row, int64_t num_rows, float* scratch);

  // Multiply a panel by tiles [first_tile, last_tile); the panel's first row is row `first_row` of the output.
  void (*multiply)(const Weight& weight, const Panel& panel, int64_t first_tile, int64_t last_tile,
                   const Output& output, int64_t first_row);

  // Write row `row` of W, K floats.
  void (*look_up)(const Weight& weight, int64_t row, float* y);

  // See attention_plan.h.
  AttentionFunction attend;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni, kAmxInt8;
#elif defined(__aarch64__)
extern const Kernels kNeonDotprod;
#endif

// The instruction set in use; chosen at load, or by `use`.
const Kernels& kernels();

}  // namespace qwen3vl
