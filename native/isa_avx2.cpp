// AVX2 without VNNI: a tile's 16 rows of W are the 32-bit lanes of two registers.
//
// vpmaddubsw adds two products in 16 bits and cuts off what they do not hold. Codes of 4 bits leave room for 8 such sums:
// 16 * 15 * 127 < 2^15. Codes of 8 bits are taken around 128, and x by their sign: 2 * 128 * 127 < 2^15.
#define QWEN3VL_ISA avx2

#include "kernels.h"
#include "lanes.h"

namespace avx2 {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

// Accumulators, codes and x fill the 16 registers.
template <int BITS>
constexpr int kDirectRows = BITS == 4 ? 3 : 4;
template <int BITS>
constexpr int kManyRows = BITS == 4 ? 6 : 4;
template <int BITS>
constexpr int kFewRows = BITS == 4 ? 3 : 4;
template <int BITS>
constexpr int kOffset = BITS == 4 ? 0 : 128;

constexpr int kStep = 16;  // columns of each half of a block whose products are summed in 16 bits

static inline __attribute__((always_inline)) __m256i four_of_row(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

static inline __attribute__((always_inline)) __m256i load_codes(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

static inline __attribute__((always_inline)) __m256i widen(__m256i sums) {
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

template <int R>
static inline __attribute__((always_inline)) void to_lanes(const __m256i (*sums)[2], Lanes* products) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) products[r] = {_mm256_cvtepi32_ps(sums[r][0]), _mm256_cvtepi32_ps(sums[r][1])};
}

// Codes of 8 bits, stored as they are read.
template <int R>
static inline __attribute__((always_inline)) void multiply_bytes(const uint8_t* codes, const int8_t* x, int block,
                                                                 Lanes* products) {
  const __m256i middle = _mm256_set1_epi8(-128);
  __m256i sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int k = 0; k < block; k += 4, codes += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i w = _mm256_xor_si256(load_codes(codes + 32 * half), middle), size = _mm256_abs_epi8(w);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i signed_x = _mm256_sign_epi8(four_of_row(x + r * block + k), w);
        sums[r][half] = _mm256_add_epi32(sums[r][half], widen(_mm256_maddubs_epi16(size, signed_x)));
      }
    }
  }
  to_lanes<R>(sums, products);
}

template <int R>
static inline __attribute__((always_inline)) void multiply_nibbles(const uint8_t* codes, const int8_t* x, int block,
                                                                   Lanes* products) {
  const __m256i low_bits = _mm256_set1_epi8(15);
  const int half = block / 2;
  __m256i sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int first = 0; first < half; first += kStep) {
    __m256i part[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int k = first; k < first + kStep; k += 4, codes += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const __m256i both = load_codes(codes + 32 * side);
        const __m256i low = _mm256_and_si256(both, low_bits);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int8_t* row = x + r * block + k;
          part[r][side] = _mm256_add_epi16(part[r][side], _mm256_maddubs_epi16(low, four_of_row(row)));
          part[r][side] = _mm256_add_epi16(part[r][side], _mm256_maddubs_epi16(high, four_of_row(row + half)));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sums[r][0] = _mm256_add_epi32(sums[r][0], widen(part[r][0]));
      sums[r][1] = _mm256_add_epi32(sums[r][1], widen(part[r][1]));
    }
  }
  to_lanes<R>(sums, products);
}

template <int BITS, int R>
static inline __attribute__((always_inline)) void multiply_codes(const uint8_t* codes, const int8_t* x, int block,
                                                                 Lanes* products) {
  if constexpr (BITS == 4) {
    multiply_nibbles<R>(codes, x, block, products);
  } else {
    multiply_bytes<R>(codes, x, block, products);
  }
}

// A byte for each code of 4 bits, in the order of the columns.
template <int BITS>
static const uint8_t* unpack(const uint8_t* codes, int block, uint8_t* buffer) {
  if constexpr (BITS == 8) return codes;
  const __m256i low_bits = _mm256_set1_epi8(15);
  const int num_bytes = block / 2 * static_cast<int>(kTileRows);
  for (int i = 0; i < num_bytes; i += 32) {
    const __m256i both = load_codes(codes + i);
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + i), _mm256_and_si256(both, low_bits));
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + num_bytes + i),
                       _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits));
  }
  return buffer;
}

template <int BITS, int R>
static inline __attribute__((always_inline)) void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block,
                                                                    Lanes* products) {
  if constexpr (BITS == 8) {
    multiply_bytes<R>(codes, x, block, products);
  } else {
    alignas(32) __m256i sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int first = 0; first < block; first += 2 * kStep) {
      __m256i part[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
      for (int k = first; k < first + 2 * kStep; k += 4, codes += 64) {
        const __m256i left = load_codes(codes), right = load_codes(codes + 32);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m256i row = four_of_row(x + r * block + k);
          part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(left, row));
          part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(right, row));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][0] = _mm256_add_epi32(sums[r][0], widen(part[r][0]));
        sums[r][1] = _mm256_add_epi32(sums[r][1], widen(part[r][1]));
      }
    }
    to_lanes<R>(sums, products);
  }
}

#include "products.h"

}  // namespace avx2

namespace qwen3vl {
const Kernels kAvx2 = {"avx2", avx2::quantize, avx2::multiply, avx2::look_up, avx2::attend};
}
