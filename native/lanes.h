// Sixteen float32 lanes: the arithmetic that every instruction set writes the same way.
//
// A file of one instruction set defines QWEN3VL_ISA, the namespace of all that is compiled for it, and includes this file.
// It is compiled with the compiler's flags for that instruction set (`#pragma GCC target` sets no macros in C++ before
// gcc 13), and the widest registers are taken; QWEN3VL_PORTABLE_LANES asks for plain arrays, QWEN3VL_AVX2_LANES for the
// registers of AVX2. Several such files are linked together, so everything here is inlined and lies in the namespace.
//
// All instruction sets give the same bits: the lanes are sixteen everywhere, each function rounds once per lane, sums over
// lanes have one order. So files that include this are compiled with -ffp-contract=off: else the compiler fuses what is
// written as mul and add, where the CPU can. (The bits of a NaN may differ.)
//
//   kRegisterLanes                    how many Lanes the registers hold (plain arrays: a small number)
//   load(p), store(p, a)              16 floats, any alignment
//   load_n(p, n), store_n(p, a, n)    the first n of 16, 0 <= n <= 16; the rest is zero, or left as it is; not touched in memory
//   broadcast(x), zero()
//   add, sub, mul, div, sqrt, abs
//   fma(a, b, c)                      a * b + c, rounded once
//   max(a, b)                         NaN where either is NaN
//   max_number(a, b), min_number(a, b)   a > b ? a : b, and a < b ? a : b: so b where either is NaN
//   first_n(n, a, b)                  lanes below n of a, the others of b, 0 <= n <= 16
//   round_to_even(a), to_int(a)       for |a| < 2^22
//   to_float, load_int, store_int     IntLanes: 16 int32
//   exp(a)                            at most 2 ulp where the result is normal; 0 for -inf, inf for what is too large
//   reduce_add(a), reduce_max(a)      lane i with i + 8, then i + 4, i + 2, i + 1; reduce_max is NaN where any lane is
//   reduce_add_16(a)                  lane i is reduce_add(a[i]) of 16 Lanes, the same bits
//   transpose(a)                      16 Lanes in place: lane j of a[i] goes to lane i of a[j]
//   load_float16, load_bfloat16, load_int8, load_uint8, load_int4      16 of them; int4: two a byte, even lane low, 8 added
//   store_float16                     rounded to even, cut off at +-65504, NaN stays NaN
//   store_int8, store_int4            rounded to even, cut off at -128 and 127, -8 and 7; NaN becomes the lowest
#pragma once

#include <stdint.h>

#ifndef QWEN3VL_ISA
#error "QWEN3VL_ISA names the namespace of the instruction set and is missing"
#endif

#define QWEN3VL_INLINE __attribute__((always_inline)) static inline
#define QWEN3VL_MEMBER __attribute__((always_inline)) inline

#if defined(QWEN3VL_PORTABLE_LANES)
#elif defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace QWEN3VL_ISA {

#if defined(QWEN3VL_PORTABLE_LANES)
#include "lanes_portable.h"
#elif defined(__AVX512F__) && !defined(QWEN3VL_AVX2_LANES)
#include "lanes_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "lanes_neon.h"
#else
#error "no lanes for these flags of the compiler; QWEN3VL_PORTABLE_LANES takes plain arrays"
#endif

// exp(x) = 2^n * exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2. The polynomial is our own fit of (exp(r) - 1) / r: its
// relative error is below 2^-25 with these coefficients. The ends are beyond what float32 can hold: 0 and infinity.
QWEN3VL_INLINE Lanes exp(Lanes x) {
    // The constants come first: where the lane is NaN, the second operand is the result.
    x = max_number(broadcast(-104.0f), min_number(broadcast(89.0f), x));
    const Lanes n = round_to_even(mul(x, broadcast(1.44269502f)));
    Lanes r = fma(n, broadcast(-0.693147182f), x);
    r = fma(n, broadcast(1.90465421e-9f), r);
    Lanes p = broadcast(0x1.6ae6dep-10f);
    p = fma(p, r, broadcast(0x1.1267d8p-7f));
    p = fma(p, r, broadcast(0x1.555824p-5f));
    p = fma(p, r, broadcast(0x1.555418p-3f));
    p = fma(p, r, broadcast(0x1.fffffcp-2f));
    p = fma(p, r, broadcast(1.0f));
    p = fma(p, r, broadcast(1.0f));
    return scale_by_power_of_two(p, n);
}

}  // namespace QWEN3VL_ISA
