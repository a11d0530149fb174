// A random case of the attention with memory of its own, for the check and the benchmark.
#pragma once

#include "../attention_plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

using namespace qwen3vl;

namespace portable {
extern const AttentionFunction attend_function;
}
namespace avx2 {
extern const AttentionFunction attend_function;
}
namespace avx512 {
extern const AttentionFunction attend_function;
}
namespace neon {
extern const AttentionFunction attend_function;
}

struct Isa {
  const char* name;
  AttentionFunction attend;
};

// The instruction sets that this CPU has; the portable one comes first.
inline int isas(Isa* list) {
  int count = 0;
  list[count++] = {"portable", portable::attend_function};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list[count++] = {"avx2", avx2::attend_function};
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    list[count++] = {"avx512", avx512::attend_function};
  }
#elif defined(__aarch64__)
  list[count++] = {"neon", neon::attend_function};
#endif
  return count;
}

struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits()) % n; }
  float uniform() { return static_cast<float>(bits()) / 1073741824.0f - 1.0f; }  // -1 ... 1
};

inline double from_half_bits(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                          : ldexp(mantissa, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Bytes that begin `shift` elements after a boundary of 64 bytes.
struct Memory {
  uint8_t* all = nullptr;
  uint8_t* start = nullptr;
  size_t bytes = 0;
  void make(size_t num_bytes, size_t shift_bytes) {
    free(all);
    bytes = num_bytes;
    all = static_cast<uint8_t*>(aligned_alloc(64, (num_bytes + shift_bytes + 127) / 64 * 64));
    start = all + shift_bytes;
    memset(all, 0xff, (num_bytes + shift_bytes + 127) / 64 * 64);  // NaN as floats
  }
  void copy(const Memory& from) { memcpy(start, from.start, bytes); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start);
  }
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(all); }
};

constexpr int64_t kMaxBatch = 64;

// What `a` points to; `make` fills it with random numbers and the rows beyond the past with NaN.
struct Case {
  Attention a = {};
  int64_t past[kMaxBatch] = {};
  Memory qkv, q_norm, k_norm, cos, sin, key, value, present_key, present_value, key_scales, value_scales, out, scratch;

  static int64_t element_bits(CacheType type) {
    return type == CacheType::kFloat32 ? 32 : type == CacheType::kFloat16 ? 16 : type == CacheType::kInt8 ? 8 : 4;
  }
  size_t cache_bytes() const {
    return static_cast<size_t>(a.batch * a.num_kv_heads * a.capacity * a.head_dim * element_bits(a.cache_type) / 8);
  }
  size_t row_bytes() const { return static_cast<size_t>(a.head_dim * element_bits(a.cache_type) / 8); }

  static void fill(Random& random, Memory& memory, int64_t count, float middle, float range, size_t shift) {
    memory.make(static_cast<size_t>(count) * sizeof(float), shift * sizeof(float));
    for (int64_t i = 0; i < count; ++i) memory.as<float>()[i] = middle + range * random.uniform();
  }

  void fill_cache(Random& random, Memory& memory, size_t shift) {
    const size_t element_bytes = a.cache_type == CacheType::kFloat32 ? 4 : a.cache_type == CacheType::kFloat16 ? 2 : 1;
    memory.make(cache_bytes(), shift * element_bytes);
    for (int64_t row = 0; row < a.batch * a.num_kv_heads * a.capacity; ++row) {
      if (row % a.capacity >= past[row / (a.num_kv_heads * a.capacity)]) continue;
      uint8_t* bytes = memory.start + static_cast<size_t>(row) * row_bytes();
      for (size_t i = 0; i < row_bytes() / element_bytes; ++i) {
        if (a.cache_type == CacheType::kFloat32) reinterpret_cast<float*>(bytes)[i] = 2.0f * random.uniform();
        // float16 numbers from 2^-5 to 2 and their negatives
        if (a.cache_type == CacheType::kFloat16) {
          const uint32_t bits = random.bits();
          reinterpret_cast<uint16_t*>(bytes)[i] = static_cast<uint16_t>((bits & 0x8000) | (0x2800 + bits % 0x1800));
        }
        if (element_bytes == 1) bytes[i] = static_cast<uint8_t>(random.bits() >> 7);
      }
    }
  }

  // The sizes of `a` and `past` are set. Everything begins `shift` elements after a boundary of 64 bytes.
  void make(Random& random, size_t shift, bool in_place) {
    const int64_t tokens = a.batch * a.num_tokens, channels = a.num_kv_heads * a.head_dim;
    fill(random, qkv, tokens * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim, 0.1f, 3.0f, shift);
    fill(random, q_norm, a.head_dim, 1.0f, 0.7f, shift);
    fill(random, k_norm, a.head_dim, 1.0f, 0.7f, shift);
    fill(random, cos, tokens * a.head_dim / 2, 0.0f, 1.0f, shift);
    fill(random, sin, tokens * a.head_dim / 2, 0.0f, 1.0f, shift);
    const float step = a.cache_type == CacheType::kInt4 ? 0.25f : 0.02f;
    fill(random, key_scales, channels, step, step / 2, shift);
    fill(random, value_scales, channels, step, step / 2, shift);
    fill_cache(random, key, shift);
    fill_cache(random, value, shift);
    out.make(static_cast<size_t>(tokens * a.num_heads * a.head_dim) * sizeof(float), shift * sizeof(float));
    a.qkv = qkv.as<float>();
    a.q_norm = q_norm.as<float>();
    a.k_norm = k_norm.as<float>();
    a.cos = cos.as<float>();
    a.sin = sin.as<float>();
    a.past_lengths = past;
    const bool has_scales = a.cache_type == CacheType::kInt8 || a.cache_type == CacheType::kInt4;
    a.key_scales = has_scales ? key_scales.as<float>() : nullptr;
    a.value_scales = has_scales ? value_scales.as<float>() : nullptr;
    a.past_key = key.start;
    a.past_value = value.start;
    a.present_key = key.start;
    a.present_value = value.start;
    if (!in_place) {
      present_key.make(cache_bytes(), 0);
      present_value.make(cache_bytes(), 0);
      a.present_key = present_key.start;
      a.present_value = present_value.start;
    }
    a.out = out.as<float>();
    scratch.make(attention_scratch_bytes(a), 0);
  }

  // All tasks on this thread, each phase from the given task on, or backwards.
  void run(AttentionFunction attend, int64_t first = 0, bool backwards = false) const {
    for (int phase = 0; phase < kAttentionPhases; ++phase) {
      const int64_t num_tasks = attention_num_tasks(a, phase);
      for (int64_t i = 0; i < num_tasks; ++i) {
        const int64_t task = (first + (backwards ? num_tasks - 1 - i : i)) % num_tasks;
        attend(a, phase, task, scratch.start);
      }
    }
  }
};
