// AVX-512 with VNNI: the 16 rows of W in a tile are the 16 lanes of one register.
#define QWEN3VL_ISA avx512_vnni

#include "kernels.h"
#include "lanes.h"

namespace avx512_vnni {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

template <int BITS>
constexpr int kDirectRows = 16;
template <int BITS>
constexpr int kManyRows = 16;
template <int BITS>
constexpr int kFewRows = 16;
template <int BITS>
constexpr int kOffset = 0;

static inline __attribute__((always_inline)) __m512i four_of_row(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// A sum takes four cycles, so few rows have several of their own, which are added at the end.
template <int BITS, int R>
static inline __attribute__((always_inline)) void multiply_codes(const uint8_t* codes, const int8_t* x, int block,
                                                                 Lanes* products) {
  constexpr int kSums = R <= 2 ? 4 : R <= 6 ? 2 : 1;
  constexpr int kUnrolled = BITS == 4 ? (R > 8 ? 1 : 2) : 4;  // groups of four columns, two in a byte of 4 bits
  __m512i sums[R][kSums];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sums[r][i] = _mm512_setzero_si512();
  }
  const __m512i low_bits = _mm512_set1_epi8(15);
  const int half = block / 2, end = BITS == 4 ? half : block;
#pragma GCC unroll 1
  for (int first = 0; first < end; first += 4 * kUnrolled) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnrolled; ++i, codes += 64) {
      const int k = first + 4 * i;
      const __m512i all = _mm512_loadu_si512(codes);
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
      if constexpr (BITS == 4) {
        const __m512i low = _mm512_and_si512(all, low_bits);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(all, 4), low_bits);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const int8_t* row = x + r * block + k;
          __m512i &sum = sums[r][2 * i % kSums], &other = sums[r][(2 * i + 1) % kSums];
          sum = _mm512_dpbusd_epi32(sum, low, four_of_row(row));
          other = _mm512_dpbusd_epi32(other, high, four_of_row(row + half));
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          sums[r][i % kSums] = _mm512_dpbusd_epi32(sums[r][i % kSums], all, four_of_row(x + r * block + k));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 1; i < kSums; ++i) sums[r][0] = _mm512_add_epi32(sums[r][0], sums[r][i]);
    products[r] = {_mm512_cvtepi32_ps(sums[r][0])};
  }
}

// A byte for each code of 4 bits, in the order of the columns.
template <int BITS>
static const uint8_t* unpack(const uint8_t* codes, int block, uint8_t* buffer) {
  if constexpr (BITS == 8) return codes;
  const __m512i low_bits = _mm512_set1_epi8(15);
  const int num_bytes = block / 2 * static_cast<int>(kTileRows);
  for (int i = 0; i < num_bytes; i += 64) {
    const __m512i both = _mm512_loadu_si512(codes + i);
    _mm512_store_si512(buffer + i, _mm512_and_si512(both, low_bits));
    _mm512_store_si512(buffer + num_bytes + i, _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits));
  }
  return buffer;
}

template <int BITS, int R>
static inline __attribute__((always_inline)) void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block,
                                                                    Lanes* products) {
  multiply_codes<8, R>(codes, x, block, products);
}

#include "products.h"

}  // namespace avx512_vnni

namespace qwen3vl {
const Kernels kAvx512Vnni = {"avx512_vnni", avx512_vnni::quantize, avx512_vnni::multiply, avx512_vnni::look_up, avx512_vnni::attend};
}
