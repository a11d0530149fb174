// 64-bit ARM with dot products (ARMv8.2): a tile's 16 rows of W are the 32-bit lanes of four registers.
//
// Products are of two signed numbers. Codes of 4 bits are signed as they are, of those of 8 bits 128 is subtracted.
// It has been run under qemu-aarch64 only: its bits are those of the other instruction sets, its speed is not measured.
#define QWEN3VL_ISA neon_dotprod

#include "kernels.h"
#include "lanes.h"

namespace neon_dotprod {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

// Sums of four rows are 16 of the 32 registers.
template <int BITS>
constexpr int kDirectRows = 4;
template <int BITS>
constexpr int kManyRows = 4;
template <int BITS>
constexpr int kFewRows = 8;
template <int BITS>
constexpr int kOffset = BITS == 4 ? 0 : 128;

// Sixteen bytes of codes, as numbers that the products take.
template <int BITS>
QWEN3VL_INLINE int8x16_t codes_at(const uint8_t* codes) {
  const uint8x16_t stored = vld1q_u8(codes);
  return vreinterpretq_s8_u8(BITS == 4 ? stored : veorq_u8(stored, vdupq_n_u8(128)));
}

QWEN3VL_INLINE int8x16_t four_of_row(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Sums of R rows of x, one inside the other so that all stay in registers.
template <int R>
struct Sums {
  int32x4_t of[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
  Sums<R - 1> others;

  QWEN3VL_MEMBER void add(const int8x16_t (&codes)[4], const int8_t* x, int block) {
    const int8x16_t row = four_of_row(x);
    of[0] = vdotq_s32(of[0], codes[0], row);
    of[1] = vdotq_s32(of[1], codes[1], row);
    of[2] = vdotq_s32(of[2], codes[2], row);
    of[3] = vdotq_s32(of[3], codes[3], row);
    others.add(codes, x + block, block);
  }
  QWEN3VL_MEMBER void to_lanes(Lanes* products) const {
    *products = {{vcvtq_f32_s32(of[0]), vcvtq_f32_s32(of[1]), vcvtq_f32_s32(of[2]), vcvtq_f32_s32(of[3])}};
    others.to_lanes(products + 1);
  }
};

template <>
struct Sums<0> {
  void add(const int8x16_t (&)[4], const int8_t*, int) {}
  void to_lanes(Lanes*) const {}
};

template <int BITS, int R>
QWEN3VL_INLINE void multiply_bytes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  Sums<R> sums;
#pragma GCC unroll 1
  for (int k = 0; k < block; k += 4, codes += 64, x += 4) {
    __builtin_prefetch(codes + kPrefetchBytes, 0, 2);
    const int8x16_t all[4] = {codes_at<BITS>(codes), codes_at<BITS>(codes + 16), codes_at<BITS>(codes + 32),
                              codes_at<BITS>(codes + 48)};
    sums.add(all, x, block);
  }
  sums.to_lanes(products);
}

template <int R>
QWEN3VL_INLINE void multiply_nibbles(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  const uint8x16_t low_bits = vdupq_n_u8(15);
  const int half = block / 2;
  Sums<R> sums;
#pragma GCC unroll 1
  for (int k = 0; k < half; k += 4, codes += 64, x += 4) {
    __builtin_prefetch(codes + kPrefetchBytes, 0, 2);
    int8x16_t low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t both = vld1q_u8(codes + 16 * i);
      low[i] = vreinterpretq_s8_u8(vandq_u8(both, low_bits));
      high[i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
    sums.add(low, x, block);
    sums.add(high, x + half, block);
  }
  sums.to_lanes(products);
}

template <int BITS, int R>
QWEN3VL_INLINE void multiply_codes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  if constexpr (BITS == 4) {
    multiply_nibbles<R>(codes, x, block, products);
  } else {
    multiply_bytes<8, R>(codes, x, block, products);
  }
}

// A byte for each code of 4 bits, in the order of the columns.
template <int BITS>
static const uint8_t* unpack(const uint8_t* codes, int block, uint8_t* buffer) {
  if constexpr (BITS == 8) return codes;
  const int num_bytes = block / 2 * static_cast<int>(kTileRows);
  for (int i = 0; i < num_bytes; i += 16) {
    const uint8x16_t both = vld1q_u8(codes + i);
    __builtin_prefetch(codes + i + kPrefetchBytes, 0, 2);
    vst1q_u8(buffer + i, vandq_u8(both, vdupq_n_u8(15)));
    vst1q_u8(buffer + num_bytes + i, vshrq_n_u8(both, 4));
  }
  return buffer;
}

template <int BITS, int R>
QWEN3VL_INLINE void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  multiply_bytes<BITS, R>(codes, x, block, products);
}

#include "products.h"

}  // namespace neon_dotprod

namespace qwen3vl {
const Kernels kNeonDotprod = {"neon_dotprod", neon_dotprod::quantize, neon_dotprod::multiply, neon_dotprod::look_up,
                              neon_dotprod::attend};
}
