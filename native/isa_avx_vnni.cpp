// AVX-VNNI, without AVX-512: the 16 rows of W in a tile are the 32-bit lanes of two registers.
//
// Its instructions mean the same as those of AVX-512 VNNI at 256 bits, which this file takes where it is compiled for
// them: so it can be run on processors that have only these, and has been; its speed is not measured.
#define QWEN3VL_ISA avx_vnni
#define QWEN3VL_AVX2_LANES

#include "kernels.h"
#include "lanes.h"

namespace avx_vnni {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

// Twelve sums, a register of codes for each half of a byte, and x fill the 16 registers.
template <int BITS>
constexpr int kDirectRows = 6;
template <int BITS>
constexpr int kManyRows = 6;
template <int BITS>
constexpr int kFewRows = BITS == 4 ? 12 : 6;
template <int BITS>
constexpr int kOffset = 0;

#if defined(__AVXVNNI__)
#define QWEN3VL_DPBUSD "%{vex%} vpdpbusd"
#else
#define QWEN3VL_DPBUSD "vpdpbusd"
#endif

// For the compiler's own function, g++ 12 copies each sum to another register and back, and has none left.
QWEN3VL_INLINE __m256i add_products(__m256i sums, __m256i codes, __m256i x) {
  __asm__(QWEN3VL_DPBUSD " %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(x));
  return sums;
}

// Loaded where it is written: the compiler would load those of several rows first, and have no registers left for sums.
QWEN3VL_INLINE __m256i four_of_row(const int8_t* x) {
  struct Four {
    int8_t bytes[4];
  };
  __m256i four;
  __asm__ volatile("vpbroadcastd %1, %0" : "=x"(four) : "m"(*reinterpret_cast<const Four*>(x)));
  return four;
}

QWEN3VL_INLINE __m256i load_codes(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

// Sums of R rows of x. One row inside the other, not an array: an array the compiler keeps in memory, too.
template <int R>
struct Sums {
  __m256i left = _mm256_setzero_si256(), right = _mm256_setzero_si256();  // the first and the last 8 rows of W
  Sums<R - 1> others;

  QWEN3VL_MEMBER void add_left(__m256i codes, const int8_t* x, int block) {
    left = add_products(left, codes, four_of_row(x));
    others.add_left(codes, x + block, block);
  }
  QWEN3VL_MEMBER void add_right(__m256i codes, const int8_t* x, int block) {
    right = add_products(right, codes, four_of_row(x));
    others.add_right(codes, x + block, block);
  }
  QWEN3VL_MEMBER void add(__m256i left_codes, __m256i right_codes, const int8_t* x, int block) {
    const __m256i row = four_of_row(x);
    left = add_products(left, left_codes, row);
    right = add_products(right, right_codes, row);
    others.add(left_codes, right_codes, x + block, block);
  }
  QWEN3VL_MEMBER void add(const Sums& more) {
    left = _mm256_add_epi32(left, more.left);
    right = _mm256_add_epi32(right, more.right);
    others.add(more.others);
  }
  QWEN3VL_MEMBER void to_lanes(Lanes* products) const {
    *products = {_mm256_cvtepi32_ps(left), _mm256_cvtepi32_ps(right)};
    others.to_lanes(products + 1);
  }
};

template <>
struct Sums<0> {
  void add_left(__m256i, const int8_t*, int) {}
  void add_right(__m256i, const int8_t*, int) {}
  void add(__m256i, __m256i, const int8_t*, int) {}
  void add(const Sums&) {}
  void to_lanes(Lanes*) const {}
};

// Few rows have a second sum each: one alone would wait for its own last step.
template <int R>
constexpr bool kHasTwoSums = R <= 3;

// FETCHES: the codes are those of the weight; unpacked ones are in the first level cache.
template <int R, bool FETCHES>
QWEN3VL_INLINE void multiply_bytes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  constexpr int step = kHasTwoSums<R> ? 8 : 4;
  Sums<R> sums;
  Sums<kHasTwoSums<R> ? R : 0> others;
#pragma GCC unroll 1
  for (int k = 0; k < block; k += step, codes += 16 * step, x += step) {
    if constexpr (FETCHES) _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
    sums.add(load_codes(codes), load_codes(codes + 32), x, block);
    if constexpr (kHasTwoSums<R>) {
      if constexpr (FETCHES) _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes + 64, _MM_HINT_T1);
      others.add(load_codes(codes + 64), load_codes(codes + 96), x + 4, block);
    }
  }
  if constexpr (kHasTwoSums<R>) sums.add(others);
  sums.to_lanes(products);
}

template <int R>
QWEN3VL_INLINE void multiply_nibbles(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  const __m256i low_bits = _mm256_set1_epi8(15);
  const int half = block / 2;
  Sums<R> sums;
  Sums<kHasTwoSums<R> ? R : 0> others;
#pragma GCC unroll 1
  for (int k = 0; k < half; k += 4, codes += 64, x += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
    const __m256i left = load_codes(codes), left_high = _mm256_and_si256(_mm256_srli_epi16(left, 4), low_bits);
    sums.add_left(_mm256_and_si256(left, low_bits), x, block);
    if constexpr (kHasTwoSums<R>) {
      others.add_left(left_high, x + half, block);
    } else {
      sums.add_left(left_high, x + half, block);
    }
    const __m256i right = load_codes(codes + 32), right_high = _mm256_and_si256(_mm256_srli_epi16(right, 4), low_bits);
    sums.add_right(_mm256_and_si256(right, low_bits), x, block);
    if constexpr (kHasTwoSums<R>) {
      others.add_right(right_high, x + half, block);
    } else {
      sums.add_right(right_high, x + half, block);
    }
  }
  if constexpr (kHasTwoSums<R>) sums.add(others);
  sums.to_lanes(products);
}

template <int BITS, int R>
QWEN3VL_INLINE void multiply_codes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  if constexpr (BITS == 4) {
    multiply_nibbles<R>(codes, x, block, products);
  } else {
    multiply_bytes<R, true>(codes, x, block, products);
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
    _mm_prefetch(reinterpret_cast<const char*>(codes) + i + kPrefetchBytes, _MM_HINT_T1);
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + i), _mm256_and_si256(both, low_bits));
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + num_bytes + i),
                       _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits));
  }
  return buffer;
}

template <int BITS, int R>
QWEN3VL_INLINE void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  multiply_bytes<R, BITS == 8>(codes, x, block, products);
}

#include "products.h"

}  // namespace avx_vnni

namespace qwen3vl {
const Kernels kAvxVnni = {"avx_vnni", avx_vnni::quantize, avx_vnni::multiply, avx_vnni::look_up, avx_vnni::attend};
}
