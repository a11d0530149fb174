// The instruction set that a test's file is compiled for: TEST_PORTABLE, or what the compiler's flags say.
#pragma once

#if defined(TEST_PORTABLE)
#define QWEN3VL_PORTABLE_LANES
#define QWEN3VL_ISA portable
#elif defined(__AVX512F__)
#define QWEN3VL_ISA avx512
#elif defined(__AVX2__)
#define QWEN3VL_ISA avx2
#elif defined(__ARM_NEON)
#define QWEN3VL_ISA neon
#else
#error "TEST_PORTABLE, or flags such as -mavx2 -mfma -mf16c"
#endif

#define TEST_TEXT_OF(x) #x
#define TEST_TEXT(x) TEST_TEXT_OF(x)
