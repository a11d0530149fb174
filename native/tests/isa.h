// The instruction set that a test's file is compiled for: one of TEST_PORTABLE, TEST_AVX2, TEST_AVX512, TEST_NEON.
#pragma once

#if defined(TEST_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define QWEN3VL_ISA avx512
#elif defined(TEST_AVX2)
#pragma GCC target("avx2,fma,f16c")
#define QWEN3VL_ISA avx2
#elif defined(TEST_NEON)
#define QWEN3VL_ISA neon
#elif defined(TEST_PORTABLE)
#define QWEN3VL_PORTABLE_LANES
#define QWEN3VL_ISA portable
#else
#error "define one of TEST_PORTABLE, TEST_AVX2, TEST_AVX512, TEST_NEON"
#endif

#define TEST_TEXT_OF(x) #x
#define TEST_TEXT(x) TEST_TEXT_OF(x)
