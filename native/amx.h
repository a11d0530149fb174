// The instructions of AMX-INT8 that products use; the number of a tile is a template argument.
//
// With QWEN3VL_EMULATED_AMX they are plain C++ that computes the same and ends the program where the processor would raise
// an exception: for tests on processors without AMX, on one thread.
#pragma once

#include <cstdint>

#if defined(QWEN3VL_EMULATED_AMX)
#include <cstdlib>
#endif

namespace qwen3vl::amx {

// What ldtilecfg reads. [Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18]
struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(num_bytes);
  }
};
static_assert(sizeof(Config) == 64);

#define QWEN3VL_AMX __attribute__((always_inline)) inline

#if !defined(QWEN3VL_EMULATED_AMX)

// All are kept in the order that they are written in, and other reads and writes of memory, too.
QWEN3VL_AMX void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
QWEN3VL_AMX void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int TILE>
QWEN3VL_AMX void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
QWEN3VL_AMX void load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
QWEN3VL_AMX void store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// C += A * B of bytes: A's are signed, B's signed if SIGNED_B. A holds [rows, 4 k], B [k, columns, 4], C [rows, columns].
template <int C, int A, int B, bool SIGNED_B>
QWEN3VL_AMX void multiply() {
  if constexpr (SIGNED_B) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  } else {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
}

#else

struct State {
  bool is_configured = false;
  Config config;
  uint8_t tiles[8][16][64];
};
inline State state;

inline void check(bool is_right) {
  if (!is_right) std::abort();
}

inline void configure(const Config& config) {
  check(config.palette == 1 && config.start_row == 0);
  for (int i = 0; i < 16; ++i) {
    check(config.rows[i] <= 16 && config.row_bytes[i] <= 64 && (config.rows[i] == 0) == (config.row_bytes[i] == 0));
    check(i < 8 || config.rows[i] == 0);
  }
  for (int i = 0; i < 14; ++i) check(config.reserved[i] == 0);
  state = State();
  state.config = config;
  state.is_configured = true;
}

inline void release() { state = State(); }

template <int TILE>
void zero() {
  check(state.is_configured && state.config.rows[TILE] > 0);
  __builtin_memset(state.tiles[TILE], 0, sizeof state.tiles[TILE]);
}

template <int TILE>
void load(const void* from, int64_t stride) {
  zero<TILE>();
  for (int i = 0; i < state.config.rows[TILE]; ++i) {
    __builtin_memcpy(state.tiles[TILE][i], static_cast<const uint8_t*>(from) + i * stride, state.config.row_bytes[TILE]);
  }
}

template <int TILE>
void store(void* to, int64_t stride) {
  check(state.is_configured && state.config.rows[TILE] > 0);
  for (int i = 0; i < state.config.rows[TILE]; ++i) {
    __builtin_memcpy(static_cast<uint8_t*>(to) + i * stride, state.tiles[TILE][i], state.config.row_bytes[TILE]);
  }
}

template <int C, int A, int B, bool SIGNED_B>
void multiply() {
  static_assert(C != A && C != B && A != B);
  const Config& config = state.config;
  check(state.is_configured && config.rows[C] > 0 && config.rows[C] == config.rows[A]);
  check(config.row_bytes[C] == config.row_bytes[B] && config.row_bytes[A] == 4 * config.rows[B]);
  for (int i = 0; i < config.rows[C]; ++i) {
    for (int n = 0; n < config.row_bytes[C] / 4; ++n) {
      int32_t sum;
      __builtin_memcpy(&sum, &state.tiles[C][i][4 * n], sizeof sum);
      for (int k = 0; k < config.row_bytes[A]; ++k) {
        const uint8_t code = state.tiles[B][k / 4][4 * n + k % 4];
        const int b = SIGNED_B ? static_cast<int8_t>(code) : code;
        sum += static_cast<int8_t>(state.tiles[A][i][k]) * b;
      }
      __builtin_memcpy(&state.tiles[C][i][4 * n], &sum, sizeof sum);
    }
  }
}

#endif

}  // namespace qwen3vl::amx
