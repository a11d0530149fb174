// AMX-INT8: a tile of a weight is 16 columns of the processor's own tiles, 64 bytes of each row of x a step.
//
// The order of instructions follows from published latencies.
// [Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter on AMX]
#define QWEN3VL_ISA amx_int8

#include "amx.h"
#include "kernels.h"
#include "lanes.h"

namespace amx_int8 {
using namespace qwen3vl;

#include "finish.h"

// Panels of so few rows are multiplied by AVX-512 VNNI, which every such processor has. Measured on a Xeon, two threads, all
// products of a decode step of the 2B shape in 4 bits, VNNI's time by tiles': 0.90 for 1 row, 0.98 for 2, 1.00 for 3 and 4, 1.06
// for 5 and 6, 1.12 for 8, 1.5 for 16; in 8 bits 0.96, 0.93, 0.97, 1.04, 1.00, 1.06, 1.2.
constexpr int64_t kFewRows = 4;

constexpr int kMaxBlock = 256, kRows = 16, kStepBytes = 64;

// How the eight tiles are used: sums and codes of two tiles of the weight, two steps each; two steps of rows of x.
constexpr int kSums = 0, kX = 2, kCodes = 4;

// A panel's rows in parts of equal height, so that one configuration is enough; the last overlaps the one before it.
struct Parts {
  int64_t num_rows, count, height;

  explicit Parts(int64_t rows) : num_rows(rows), count(divide_up(rows, kRows)), height(divide_up(rows, count)) {}
  int64_t first_row(int64_t part) const { return part + 1 < count ? part * height : num_rows - height; }
  int64_t overlap(int64_t part) const { return part * height - first_row(part); }
};

static void configure(const Parts& parts, int block) {
  const int step = block < kStepBytes ? block : kStepBytes;
  amx::Config config;
  for (int i = 0; i < 2; ++i) {
    config.set(kSums + i, static_cast<int>(parts.height), 64);
    config.set(kX + i, static_cast<int>(parts.height), step);
  }
  for (int i = 0; i < 4; ++i) config.set(kCodes + i, step / 4, 64);
  amx::configure(config);
}

// Codes of blocks less their zero points, in the order of the columns.
struct Unpacked {
  alignas(64) uint8_t codes[kMaxBlock * kTileRows];
};

// Each zero point in the four bytes of its row of W.
static inline __m512i zero_points_of_codes(const Tile& tile, int64_t block) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.zero_points + block * kTileRows));
  return _mm512_shuffle_epi8(_mm512_cvtepu8_epi32(bytes),
                             _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
}

// Make the block ready, part `part` of `count`: 4 bits are unpacked, 8 bits are only fetched.
template <int BITS>
static inline __attribute__((always_inline)) void prepare(const Weight& weight, const Tile& tile, int64_t block,
                                                          int64_t part, int64_t count, Unpacked* unpacked) {
  const uint8_t* codes = tile.codes + block * weight.block_bytes();
  const int64_t num_lines = weight.block_bytes() / 64;
  const int64_t first = num_lines * part / count, last = num_lines * (part + 1) / count;
  if constexpr (BITS == 8) {
    for (int64_t i = first; i < last; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i) + kPrefetchBytes, _MM_HINT_T1);
    }
  } else {
    const __m512i low_bits = _mm512_set1_epi8(15), zero_points = zero_points_of_codes(tile, block);
    uint8_t* low = unpacked->codes;
    uint8_t* high = low + 64 * num_lines;
    for (int64_t i = first; i < last; ++i) {
      const __m512i both = _mm512_loadu_si512(codes + 64 * i);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i) + kPrefetchBytes, _MM_HINT_T1);
      const __m512i high_codes = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
      _mm512_store_si512(low + 64 * i, _mm512_sub_epi8(_mm512_and_si512(both, low_bits), zero_points));
      _mm512_store_si512(high + 64 * i, _mm512_sub_epi8(high_codes, zero_points));
    }
  }
}

// The sums of one part of a panel with one block of the weight, and where they belong.
struct Sums {
  alignas(64) int32_t of[2][kRows * kTileRows];
  int64_t block, first_row, first, last;  // rows [first, last) of these are added to the totals of first_row + ...
};

// COLUMNS tiles of a weight, one or two, by all rows of a panel; a block has STEPS steps.
template <int BITS, int STEPS, int COLUMNS>
class Product {
 public:
  Product(const Weight& weight, const Panel& panel, const Parts& parts, int64_t index)
      : weight_(weight), panel_(panel), parts_(parts), tiles_{Tile(weight, index), Tile(weight, index + COLUMNS - 1)} {
    for (int c = 0; c < COLUMNS; ++c) {
      for (int64_t i = 0; i < panel.num_rows; ++i) store(totals_[c] + i * kTileRows, zero());
    }
  }

  const float* totals(int column) const { return totals_[column]; }
  const Tile& tile(int column) const { return tiles_[column]; }

  // While the dot products of one part are under way, the sums of the part before are added to the totals, and some of
  // the next block is made ready.
  void run() {
    const int64_t num_blocks = weight_.num_blocks();
    for (int c = 0; c < COLUMNS; ++c) prepare<BITS>(weight_, tiles_[c], 0, 0, 1, &unpacked_[0][c]);
    Sums* before = nullptr;
    int turn = 0;
    for (int64_t j = 0; j < num_blocks; ++j) {
      const uint8_t* codes[2] = {codes_of(j, 0), codes_of(j, COLUMNS - 1)};
      if constexpr (STEPS <= 2) load_all_codes(codes);
      for (int64_t part = 0; part < parts_.count; ++part) {
        Sums* sums = &sums_[turn];
        multiply_part(codes, j, part, sums);
        if (j + 1 < num_blocks) {
          for (int c = 0; c < COLUMNS; ++c) {
            prepare<BITS>(weight_, tiles_[c], j + 1, part, parts_.count, &unpacked_[(j + 1) % 2][c]);
          }
        }
        if (before != nullptr) finish(*before);
        before = sums;
        turn = 1 - turn;
      }
    }
    finish(*before);
  }

 private:
  const uint8_t* codes_of(int64_t block, int column) const {
    return BITS == 8 ? tiles_[column].codes + block * weight_.block_bytes() : unpacked_[block % 2][column].codes;
  }

  template <int STEP>
  static void load_codes(const uint8_t* const* codes) {
    constexpr int tile = kCodes + STEP % 2 * 2;
    amx::load<tile>(codes[0] + STEP * kStepBytes * kTileRows, 64);
    if constexpr (COLUMNS == 2) amx::load<tile + 1>(codes[1] + STEP * kStepBytes * kTileRows, 64);
  }

  static void load_all_codes(const uint8_t* const* codes) {
    load_codes<0>(codes);
    if constexpr (STEPS == 2) load_codes<1>(codes);
  }

  template <int STEP>
  void multiply_steps(const uint8_t* const* codes, const int8_t* x) const {
    if constexpr (STEP < STEPS) {
      constexpr int tile = kCodes + STEP % 2 * 2, rows = kX + STEP % 2;
      if constexpr (STEPS > 2) load_codes<STEP>(codes);
      amx::load<rows>(x + STEP * kStepBytes, weight_.block);
      amx::multiply<kSums, rows, tile, BITS == 4>();
      if constexpr (COLUMNS == 2) amx::multiply<kSums + 1, rows, tile + 1, BITS == 4>();
      multiply_steps<STEP + 1>(codes, x);
    }
  }

  void multiply_part(const uint8_t* const* codes, int64_t block, int64_t part, Sums* sums) const {
    const int64_t first_row = parts_.first_row(part);
    amx::zero<kSums>();
    if constexpr (COLUMNS == 2) amx::zero<kSums + 1>();
    multiply_steps<0>(codes, panel_.codes + (block * panel_.num_rows + first_row) * weight_.block);
    amx::store<kSums>(sums->of[0], 64);
    if constexpr (COLUMNS == 2) amx::store<kSums + 1>(sums->of[1], 64);
    sums->block = block;
    sums->first_row = first_row;
    sums->first = parts_.overlap(part);
    sums->last = parts_.height;
  }

  void finish(const Sums& sums) {
    Lanes scales[COLUMNS], zero_points[COLUMNS];
    const int32_t* products[COLUMNS];
    float* totals[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      scales[c] = scales_of(tiles_[c], sums.block);
      zero_points[c] = load_uint8(tiles_[c].zero_points + sums.block * kTileRows);
      products[c] = sums.of[c] + sums.first * kTileRows;
      totals[c] = totals_[c] + (sums.first_row + sums.first) * kTileRows;
    }
    const int64_t place = sums.block * panel_.num_rows + sums.first_row + sums.first, count = sums.last - sums.first;
    const float *scales_x = panel_.scales + place, *sums_x = panel_.sums + place;
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < COLUMNS; ++c) {
        const Lanes part = to_float(load_int(products[c] + i * kTileRows)), total = load(totals[c] + i * kTileRows);
        // Of 4 bits the zero points are in the products already.
        store(totals[c] + i * kTileRows,
              BITS == 8 ? add_block(total, part, sums_x[i], scales_x[i], zero_points[c], scales[c])
                        : fma(mul(part, broadcast(scales_x[i])), scales[c], total));
      }
    }
  }

  const Weight& weight_;
  const Panel& panel_;
  const Parts& parts_;
  const Tile tiles_[2];
  Sums sums_[2];
  Unpacked unpacked_[2][BITS == 4 ? COLUMNS : 1];
  alignas(64) float totals_[COLUMNS][kPanelRows * kTileRows];
};

template <int BITS, int STEPS, int COLUMNS>
static void multiply_columns(const Weight& weight, const Panel& panel, const Parts& parts, int64_t index,
                             const Output& output, int64_t first_row) {
  Product<BITS, STEPS, COLUMNS> product(weight, panel, parts, index);
  product.run();
  for (int c = 0; c < COLUMNS; ++c) {
    write_tile(weight, product.tile(c), index + c, product.totals(c), panel.num_rows, output, first_row);
  }
}

template <int BITS, int STEPS>
static void multiply_tiles(const Weight& weight, const Panel& panel, int64_t first_tile, int64_t last_tile,
                           const Output& output, int64_t first_row) {
  const Parts parts(panel.num_rows);
  configure(parts, weight.block);
  int64_t index = first_tile;
  for (; index + 2 <= last_tile; index += 2) {
    multiply_columns<BITS, STEPS, 2>(weight, panel, parts, index, output, first_row);
  }
  if (index < last_tile) multiply_columns<BITS, STEPS, 1>(weight, panel, parts, index, output, first_row);
  amx::release();
}

template <int BITS>
static void multiply_bits(const Weight& weight, const Panel& panel, int64_t first_tile, int64_t last_tile,
                          const Output& output, int64_t first_row) {
  if (weight.block == 256) return multiply_tiles<BITS, 4>(weight, panel, first_tile, last_tile, output, first_row);
  if (weight.block == 128) return multiply_tiles<BITS, 2>(weight, panel, first_tile, last_tile, output, first_row);
  multiply_tiles<BITS, 1>(weight, panel, first_tile, last_tile, output, first_row);
}

static void multiply(const Weight& weight, const Panel& panel, int64_t first_tile, int64_t last_tile,
                     const Output& output, int64_t first_row) {
  if (panel.num_rows <= kFewRows) return kAvx512Vnni.multiply(weight, panel, first_tile, last_tile, output, first_row);
  if (weight.bits == 4) return multiply_bits<4>(weight, panel, first_tile, last_tile, output, first_row);
  multiply_bits<8>(weight, panel, first_tile, last_tile, output, first_row);
}

static void quantize(const Source& source, int64_t first_row, const Weight& weight, const Panel& panel,
                     int64_t panel_row, int64_t num_rows, float* scratch) {
  kAvx512Vnni.quantize(source, first_row, weight, panel, panel_row, num_rows, scratch);
}

static void look_up(const Weight& weight, int64_t row, float* y) { kAvx512Vnni.look_up(weight, row, y); }

static void attend(const Attention& attention, int phase, int64_t task, void* scratch) {
  kAvx512Vnni.attend(attention, phase, task, scratch);
}

}  // namespace amx_int8

namespace qwen3vl {
const Kernels kAmxInt8 = {"amx_int8", amx_int8::quantize, amx_int8::multiply, amx_int8::look_up, amx_int8::attend};
}
