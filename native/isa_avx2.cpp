// AVX2 without VNNI: a tile's 16 rows of W are the 32-bit lanes of two registers.
//
// vpmaddubsw adds two products in 16 bits and cuts off what they do not hold. Codes of 4 bits leave room for 8 such
// sums: 16 * 15 * 127 < 2^15. Codes of 8 bits are taken around 128, and x by their sign: 2 * 128 * 127 < 2^15.
#define QWEN3VL_ISA avx2

#include "kernels.h"
#include "lanes.h"

namespace avx2 {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

// Measured on Zen 4: up to so many rows, reading the stored codes again costs less than unpacking them.
template <int BITS>
constexpr int kDirectRows = BITS == 4 ? 6 : 4;
template <int BITS>
constexpr int kManyRows = BITS == 4 ? 6 : 4;
template <int BITS>
constexpr int kFewRows = BITS == 4 ? 24 : 16;
template <int BITS>
constexpr int kOffset = BITS == 4 ? 0 : 128;

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

// Read a second time, from the nearest cache, rather than kept in a register that a sum needs.
QWEN3VL_INLINE __m256i load_again(const uint8_t* codes) {
  struct Line {
    uint8_t bytes[32];
  };
  __m256i loaded;
  __asm__ volatile("vmovdqu %1, %0" : "=x"(loaded) : "m"(*reinterpret_cast<const Line*>(codes)));
  return loaded;
}

QWEN3VL_INLINE __m256i low_half(__m256i codes) {
  return _mm256_and_si256(codes, _mm256_set1_epi8(15));
}
QWEN3VL_INLINE __m256i high_half(__m256i codes) { return low_half(_mm256_srli_epi16(codes, 4)); }

// Add products of four columns to sums in 16 bits. With the compiler's own functions g++ 12 moves the sums to other
// registers and back, and has none left.
QWEN3VL_INLINE void add_products(__m256i& sums, __m256i codes, __m256i row) {
  __m256i products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(codes), "x"(row));
}

// Sums of R rows in 32 bits, two registers each, in memory.
template <int R>
struct Sums {
  __m256i of[R][2];

  QWEN3VL_MEMBER Sums() {
    for (int r = 0; r < R; ++r) of[r][0] = of[r][1] = _mm256_setzero_si256();
  }
  QWEN3VL_MEMBER void to_lanes(Lanes* products) const {
    for (int r = 0; r < R; ++r) products[r] = {_mm256_cvtepi32_ps(of[r][0]), _mm256_cvtepi32_ps(of[r][1])};
  }
};

// Sums of R rows in 16 bits, which have room for kStep columns. One row inside the other, not an array: an array the
// compiler keeps in memory, too.
template <int R>
struct Parts {
  __m256i first = _mm256_setzero_si256(), second = _mm256_setzero_si256();
  Parts<R - 1> others;

  // Products of four columns with codes of two registers.
  QWEN3VL_MEMBER void add(__m256i codes, __m256i more_codes, const int8_t* x, int block) {
    const __m256i row = four_of_row(x);
    add_products(first, codes, row);
    add_products(second, more_codes, row);
    others.add(codes, more_codes, x + block, block);
  }
  QWEN3VL_MEMBER void add_to(__m256i (*sums)[2]) const {
    const __m256i one = _mm256_set1_epi16(1);
    sums[0][0] = _mm256_add_epi32(sums[0][0], _mm256_madd_epi16(first, one));
    sums[0][1] = _mm256_add_epi32(sums[0][1], _mm256_madd_epi16(second, one));
    others.add_to(sums + 1);
  }
};

template <>
struct Parts<0> {
  void add(__m256i, __m256i, const int8_t*, int) {}
  void add_to(__m256i (*)[2]) const {}
};

constexpr int kStep = 32;  // columns of codes below 16 whose products a sum in 16 bits has room for

template <int R>
QWEN3VL_INLINE void multiply_nibbles(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  const int half = block / 2;
  Sums<R> sums;
#pragma GCC unroll 1
  for (int first = 0; first < half; first += kStep / 2) {
    Parts<R> parts;
#pragma GCC unroll 4
    for (int k = 0; k < kStep / 2; k += 4, codes += 64, x += 4) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
      const __m256i both = load_codes(codes), more = load_codes(codes + 32);
      parts.add(low_half(both), low_half(more), x, block);
      if constexpr (R <= 3) {
        parts.add(high_half(both), high_half(more), x + half, block);
      } else {
        parts.add(high_half(load_again(codes)), high_half(load_again(codes + 32)), x + half, block);
      }
    }
    parts.add_to(sums.of);
  }
  sums.to_lanes(products);
}

// Codes of 8 bits less 128, and their sizes.
struct Signed {
  __m256i codes, sizes;

  QWEN3VL_MEMBER explicit Signed(const uint8_t* from)
      : codes(_mm256_xor_si256(load_codes(from), _mm256_set1_epi8(-128))), sizes(_mm256_abs_epi8(codes)) {}
};

// Sums of R rows in 32 bits, in registers.
template <int R>
struct WideSums {
  __m256i first = _mm256_setzero_si256(), second = _mm256_setzero_si256();
  WideSums<R - 1> others;

  QWEN3VL_MEMBER void add(const Signed& left, const Signed& right, const int8_t* x, int block) {
    const __m256i row = four_of_row(x);
    add_signed(first, left, row);
    add_signed(second, right, row);
    others.add(left, right, x + block, block);
  }
  QWEN3VL_MEMBER void to_lanes(Lanes* products) const {
    *products = {_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second)};
    others.to_lanes(products + 1);
  }

 private:
  static QWEN3VL_MEMBER void add_signed(__m256i& sums, const Signed& codes, __m256i row) {
    __m256i products;
    __asm__("vpsignb %2, %4, %1\n\tvpmaddubsw %1, %3, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sums), "=&x"(products)
            : "x"(codes.codes), "x"(codes.sizes), "x"(row), "x"(_mm256_set1_epi16(1)));
  }
};

template <>
struct WideSums<0> {
  void add(const Signed&, const Signed&, const int8_t*, int) {}
  void to_lanes(Lanes*) const {}
};

template <int R>
QWEN3VL_INLINE void multiply_bytes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  WideSums<R> sums;
#pragma GCC unroll 1
  for (int k = 0; k < block; k += 4, codes += 64, x += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T1);
    sums.add(Signed(codes), Signed(codes + 32), x, block);
  }
  sums.to_lanes(products);
}

template <int BITS, int R>
QWEN3VL_INLINE void multiply_codes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
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
  const int num_bytes = block / 2 * static_cast<int>(kTileRows);
  for (int i = 0; i < num_bytes; i += 32) {
    const __m256i both = load_codes(codes + i);
    _mm_prefetch(reinterpret_cast<const char*>(codes) + i + kPrefetchBytes, _MM_HINT_T1);
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + i), low_half(both));
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + num_bytes + i), high_half(both));
  }
  return buffer;
}

template <int R>
QWEN3VL_INLINE void multiply_small(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  Sums<R> sums;
#pragma GCC unroll 1
  for (int first = 0; first < block; first += kStep) {
    Parts<R> parts;
#pragma GCC unroll 1
    for (int k = 0; k < kStep; k += 4, codes += 64, x += 4) {
      parts.add(load_codes(codes), load_codes(codes + 32), x, block);
    }
    parts.add_to(sums.of);
  }
  sums.to_lanes(products);
}

// A function of its own, so that no register is kept for its caller.
template <int BITS, int R>
static __attribute__((noinline)) void multiply_unpacked(const uint8_t* codes, const int8_t* x, int block,
                                                        Lanes* products) {
  if constexpr (BITS == 4) {
    multiply_small<R>(codes, x, block, products);
  } else {
    multiply_bytes<R>(codes, x, block, products);
  }
}

#include "products.h"

}  // namespace avx2

namespace qwen3vl {
const Kernels kAvx2 = {"avx2", avx2::quantize, avx2::multiply, avx2::look_up, avx2::attend};
}
