// AVX-512 with VNNI: the 16 rows of W in a tile are the 16 lanes of one register.
#define QWEN3VL_ISA avx512_vnni

#include "kernels.h"
#include "lanes.h"

namespace avx512_vnni {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

// Measured on Zen 4: with 16 rows at once the sums have room, but the addresses of the rows do not.
template <int BITS>
constexpr int kDirectRows = 12;
template <int BITS>
constexpr int kManyRows = 12;
template <int BITS>
constexpr int kFewRows = BITS == 4 ? 24 : 12;
template <int BITS>
constexpr int kOffset = 0;

// Sums of R rows of x, one inside the other so that all stay in registers.
template <int R>
struct Sums {
  __m512i of = _mm512_setzero_si512();
  Sums<R - 1> others;

  // Add products of four columns. With the compiler's own function g++ 12 moves sums to other registers and back.
  QWEN3VL_MEMBER void add(__m512i codes, const int8_t* x, int block) {
    struct Four {
      int8_t bytes[4];
    };
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(of) : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
    others.add(codes, x + block, block);
  }
  QWEN3VL_MEMBER void add(const Sums& more) {
    of = _mm512_add_epi32(of, more.of);
    others.add(more.others);
  }
  QWEN3VL_MEMBER void to_lanes(Lanes* products) const {
    *products = {_mm512_cvtepi32_ps(of)};
    others.to_lanes(products + 1);
  }
};

template <>
struct Sums<0> {
  void add(__m512i, const int8_t*, int) {}
  void add(const Sums&) {}
  void to_lanes(Lanes*) const {}
};

// A sum takes four cycles, so few rows have several of their own, which are added at the end.
template <int R>
struct Chains {
  static constexpr int kCount = R <= 2 ? 4 : R <= 6 ? 2 : 1;
  Sums<R> first;
  Sums<(kCount > 1 ? R : 0)> second;
  Sums<(kCount > 2 ? R : 0)> third, fourth;

  template <int I>
  QWEN3VL_MEMBER auto& at() {
    if constexpr (I % kCount == 0) {
      return first;
    } else if constexpr (I % kCount == 1) {
      return second;
    } else if constexpr (I % kCount == 2) {
      return third;
    } else {
      return fourth;
    }
  }
  QWEN3VL_MEMBER void to_lanes(Lanes* products) {
    if constexpr (kCount > 2) third.add(fourth);
    if constexpr (kCount > 2) second.add(third);
    if constexpr (kCount > 1) first.add(second);
    first.to_lanes(products);
  }
};

// Codes of the weight, which are fetched ahead; unpacked ones are in the first level cache.
template <bool FETCHES = true>
QWEN3VL_INLINE __m512i load_codes(const uint8_t* codes) {
  if constexpr (FETCHES) _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
  return _mm512_loadu_si512(codes);
}

QWEN3VL_INLINE __m512i low_half(__m512i codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
QWEN3VL_INLINE __m512i high_half(__m512i codes) { return low_half(_mm512_srli_epi16(codes, 4)); }

template <int R>
QWEN3VL_INLINE void multiply_nibbles(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  const int half = block / 2;
  Chains<R> sums;
#pragma GCC unroll 1
  for (int k = 0; k < half; k += 8, codes += 128, x += 8) {
    const __m512i both = load_codes(codes);
    sums.template at<0>().add(low_half(both), x, block);
    sums.template at<1>().add(high_half(both), x + half, block);
    const __m512i more = load_codes(codes + 64);
    sums.template at<2>().add(low_half(more), x + 4, block);
    sums.template at<3>().add(high_half(more), x + half + 4, block);
  }
  sums.to_lanes(products);
}

template <int R, bool FETCHES>
QWEN3VL_INLINE void multiply_bytes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  Chains<R> sums;
#pragma GCC unroll 1
  for (int k = 0; k < block; k += 16, codes += 256, x += 16) {
    sums.template at<0>().add(load_codes<FETCHES>(codes), x, block);
    sums.template at<1>().add(load_codes<FETCHES>(codes + 64), x + 4, block);
    sums.template at<2>().add(load_codes<FETCHES>(codes + 128), x + 8, block);
    sums.template at<3>().add(load_codes<FETCHES>(codes + 192), x + 12, block);
  }
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
  const int num_bytes = block / 2 * static_cast<int>(kTileRows);
  for (int i = 0; i < num_bytes; i += 64) {
    const __m512i both = load_codes(codes + i);
    _mm512_store_si512(buffer + i, low_half(both));
    _mm512_store_si512(buffer + num_bytes + i, high_half(both));
  }
  return buffer;
}

template <int BITS, int R>
QWEN3VL_INLINE void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  multiply_bytes<R, BITS == 8>(codes, x, block, products);
}

#include "products.h"

}  // namespace avx512_vnni

namespace qwen3vl {
const Kernels kAvx512Vnni = {"avx512_vnni", avx512_vnni::quantize, avx512_vnni::multiply, avx512_vnni::look_up,
                             avx512_vnni::attend};
}
