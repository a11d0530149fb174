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

template <int BITS, int R>
static inline __attribute__((always_inline)) void multiply_codes(const uint8_t* codes, const int8_t* x, int block,
                                                                 Lanes* products) {
  __m512i sums[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_si512();
  if constexpr (BITS == 4) {
    const __m512i low_bits = _mm512_set1_epi8(15);
    const int half = block / 2;
    for (int k = 0; k < half; k += 4, codes += 64) {
      const __m512i both = _mm512_loadu_si512(codes);
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T0);
      const __m512i low = _mm512_and_si512(both, low_bits);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const int8_t* row = x + r * block + k;
        sums[r] = _mm512_dpbusd_epi32(sums[r], low, four_of_row(row));
        sums[r] = _mm512_dpbusd_epi32(sums[r], high, four_of_row(row + half));
      }
    }
  } else {
    for (int k = 0; k < block; k += 4, codes += 64) {
      const __m512i all = _mm512_loadu_si512(codes);
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], all, four_of_row(x + r * block + k));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) products[r] = {_mm512_cvtepi32_ps(sums[r])};
}

// The codes are unpacked on the way to the products: two instructions for 32 of these.
template <int BITS>
static const uint8_t* unpack(const uint8_t* codes, int, uint8_t*) {
  return codes;
}

template <int BITS, int R>
static inline __attribute__((always_inline)) void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block,
                                                                    Lanes* products) {
  multiply_codes<BITS, R>(codes, x, block, products);
}

#include "products.h"

}  // namespace avx512_vnni

namespace qwen3vl {
const Kernels kAvx512Vnni = {"avx512_vnni", avx512_vnni::quantize, avx512_vnni::multiply, avx512_vnni::look_up, avx512_vnni::attend};
}
