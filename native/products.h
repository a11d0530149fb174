// Products with weights in few bits, included by the file of each instruction set inside its namespace. The file gives:
//
//   template <int BITS> constexpr int kDirectRows, kManyRows;   most rows of x that one call of the two functions takes
//   template <int BITS> constexpr int kFewRows;   panels of up to so many rows are multiplied with the stored codes
//   template <int BITS> constexpr int kOffset;    what the two functions subtract from each code
//   template <int BITS, int R> void multiply_codes(const uint8_t* codes, const int8_t* x, int block, Lanes* products);
//       products of R rows of x, [R, block], with the stored codes of a block, as whole numbers
//   template <int BITS> const uint8_t* unpack(const uint8_t* codes, int block, uint8_t* buffer);
//       what multiply_unpacked reads: the buffer, filled, or the codes themselves
//   template <int BITS, int R> void multiply_unpacked(const uint8_t* unpacked, const int8_t* x, int block, Lanes* products);
//
// All instruction sets sum whole numbers, which is exact, and then compute in the same order, so results are the same bits.

constexpr int kMaxBlock = 256;

#include "finish.h"

template <int BITS>
static inline Lanes zero_points_of(const Tile& tile, int64_t block) {
  return sub(load_uint8(tile.zero_points + block * kTileRows), broadcast(kOffset<BITS>));
}

// R rows of a panel, from the stored codes; totals stay in registers.
template <int BITS, int R>
static void multiply_few(const Weight& weight, const Panel& panel, const Tile& tile, int64_t row, float* totals) {
  Lanes sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = zero();
  const int64_t num_blocks = weight.num_blocks(), block_bytes = weight.block_bytes();
  for (int64_t j = 0; j < num_blocks; ++j) {
    Lanes products[R];
    const int64_t first = j * panel.num_rows + row;
    multiply_codes<BITS, R>(tile.codes + j * block_bytes, panel.codes + first * weight.block, weight.block, products);
    const Lanes zero_points = zero_points_of<BITS>(tile, j), scales = scales_of(tile, j);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sum[r] = add_block(sum[r], products[r], panel.sums[first + r], panel.scales[first + r], zero_points, scales);
    }
  }
  for (int r = 0; r < R; ++r) store(totals + r * kTileRows, sum[r]);
}

template <int BITS, int R>
static void add_unpacked(const Panel& panel, int64_t first, int block, const uint8_t* unpacked, Lanes zero_points,
                         Lanes scales, float* totals) {
  Lanes products[R];
  multiply_unpacked<BITS, R>(unpacked, panel.codes + first * block, block, products);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* total = totals + r * kTileRows;
    store(total, add_block(load(total), products[r], panel.sums[first + r], panel.scales[first + r], zero_points, scales));
  }
}

template <int BITS, int R>
static void add_rest(int64_t num_rows, const Panel& panel, int64_t first, int block, const uint8_t* unpacked,
                     Lanes zero_points, Lanes scales, float* totals) {
  if constexpr (R > 0) {
    if (num_rows == R) {
      add_unpacked<BITS, R>(panel, first, block, unpacked, zero_points, scales, totals);
    } else {
      add_rest<BITS, R - 1>(num_rows, panel, first, block, unpacked, zero_points, scales, totals);
    }
  }
}

// R rows of a panel and tiles [first_tile, last_tile).
template <int BITS, int R>
static void multiply_few_tiles(const Weight& weight, const Panel& panel, int64_t row, int64_t first_tile, int64_t last_tile,
                               const Output& output, int64_t output_row) {
  alignas(64) float totals[R * kTileRows];
  for (int64_t index = first_tile; index < last_tile; ++index) {
    const Tile tile(weight, index);
    multiply_few<BITS, R>(weight, panel, tile, row, totals);
    write_tile(weight, tile, index, totals, R, output, output_row);
  }
}

template <int BITS, int R>
static void few_rows(int64_t num_rows, const Weight& weight, const Panel& panel, int64_t row, int64_t first_tile,
                     int64_t last_tile, const Output& output, int64_t output_row) {
  if constexpr (R > 0) {
    if (num_rows == R) {
      multiply_few_tiles<BITS, R>(weight, panel, row, first_tile, last_tile, output, output_row);
    } else {
      few_rows<BITS, R - 1>(num_rows, weight, panel, row, first_tile, last_tile, output, output_row);
    }
  }
}

// All rows of a panel, block by block.
template <int BITS>
static void multiply_many(const Weight& weight, const Panel& panel, const Tile& tile, float* totals) {
  alignas(64) uint8_t buffer[kMaxBlock * kTileRows];
  const int block = weight.block;
  for (int64_t i = 0; i < panel.num_rows; ++i) store(totals + i * kTileRows, zero());
  for (int64_t j = 0; j < weight.num_blocks(); ++j) {
    const uint8_t* unpacked = unpack<BITS>(tile.codes + j * weight.block_bytes(), block, buffer);
    const Lanes zero_points = zero_points_of<BITS>(tile, j), scales = scales_of(tile, j);
    const int64_t first = j * panel.num_rows;
    int64_t row = 0;
    for (; row + kManyRows<BITS> <= panel.num_rows; row += kManyRows<BITS>) {
      add_unpacked<BITS, kManyRows<BITS>>(panel, first + row, block, unpacked, zero_points, scales, totals + row * kTileRows);
    }
    add_rest<BITS, kManyRows<BITS> - 1>(panel.num_rows - row, panel, first + row, block, unpacked, zero_points, scales,
                                  totals + row * kTileRows);
  }
}

template <int BITS>
static void multiply_tiles(const Weight& weight, const Panel& panel, int64_t first_tile, int64_t last_tile,
                           const Output& output, int64_t first_row) {
  if (panel.num_rows <= kFewRows<BITS>) {
    constexpr int R = kDirectRows<BITS>;
    // Where rows are taken in several parts, each tile is read again from the cache, not all of them from the memory.
    const int64_t step = panel.num_rows > R ? 1 : last_tile - first_tile;
    for (int64_t first = first_tile; first < last_tile; first += step) {
      const int64_t last = first + step;
      int64_t row = 0;
      for (; row + R <= panel.num_rows; row += R) {
        multiply_few_tiles<BITS, R>(weight, panel, row, first, last, output, first_row + row);
      }
      few_rows<BITS, R - 1>(panel.num_rows - row, weight, panel, row, first, last, output, first_row + row);
    }
    return;
  }
  alignas(64) float totals[kPanelRows * kTileRows];
  for (int64_t index = first_tile; index < last_tile; ++index) {
    const Tile tile(weight, index);
    multiply_many<BITS>(weight, panel, tile, totals);
    write_tile(weight, tile, index, totals, panel.num_rows, output, first_row);
  }
}

static void multiply(const Weight& weight, const Panel& panel, int64_t first_tile, int64_t last_tile,
                     const Output& output, int64_t first_row) {
  if (weight.bits == 4) {
    multiply_tiles<4>(weight, panel, first_tile, last_tile, output, first_row);
  } else {
    multiply_tiles<8>(weight, panel, first_tile, last_tile, output, first_row);
  }
}
