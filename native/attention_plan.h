// Decode attention as operators see it: what is computed, the memory it needs, the tasks it is split into.
//
// Letters: B sequences, S new tokens of each, N query heads, K key-value heads, G = N / K, H channels of a head, T cache rows.
//
// Call, with the function `attend` of an instruction set and scratch memory of attention_scratch_bytes(a), aligned to 64:
//   for phase in 0 ... kAttentionPhases - 1:
//     for task in 0 ... attention_num_tasks(a, phase) - 1, in any order, on any threads:
//       attend(a, phase, task, scratch)
// Phase 0 norms and rotates queries and keys and writes the new rows of the cache, phase 1 attends, phase 2 puts together what
// phase 1 split. The bits of a sequence do not depend on the others, on threads, or on which addresses are aligned.
//
// Rows of the cache at or beyond past_lengths[b] + S are neither read nor written, whatever they hold.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen3vl {

// Functions that several files share are inlined into each: a copy of its own, compiled for one instruction set, could be
// the one that the linker keeps for all.
#define QWEN3VL_SHARED __attribute__((always_inline)) inline

enum class CacheType { kFloat32, kFloat16, kInt8, kInt4 };

constexpr int kAttentionPhases = 3;
constexpr int64_t kMaxHeadDim = 256;       // channels of a head, a multiple of 16; tasks keep blocks of that size on the stack
constexpr int64_t kSplitRows = 256;        // rows of the cache that one task of a decode step reads
constexpr int64_t kBlockPairs = 64;        // pairs of a token and a query head that one task of a longer input takes
constexpr int64_t kPreparedRows = 8;       // tokens that one task of phase 0 takes
constexpr int64_t kCombinedAtOnce = 1024;  // partial results that one thread puts together alone

// S tokens of B sequences after `past_lengths` cached ones. Shapes as in docs/cpu_kernels.md; the caller has checked them:
// past_lengths[b] >= 0 and past_lengths[b] + S <= T, head_dim a multiple of 16 up to kMaxHeadDim, N a multiple of K.
struct Attention {
  int64_t batch;         // B
  int64_t num_tokens;    // S
  int64_t num_heads;     // N
  int64_t num_kv_heads;  // K
  int64_t head_dim;      // H
  int64_t capacity;      // T
  float scale;           // of the scores
  float epsilon;         // of the norms
  CacheType cache_type;
  const float* qkv;             // [B, S, (N + 2 K) H]
  const float* q_norm;          // [H]
  const float* k_norm;          // [H]
  const float* cos;             // [B, S, H / 2]
  const float* sin;             // [B, S, H / 2]
  const int64_t* past_lengths;  // [B]
  const void* past_key;         // [B, K, T, H]; in int4 two channels a byte
  const void* past_value;
  void* present_key;            // the past's own memory, or other memory that its rows are copied to
  void* present_value;
  const float* key_scales;      // [K, H], positive; null unless the cache is int8 or int4
  const float* value_scales;
  float* out;                   // [B, S, N H]

  QWEN3VL_SHARED int64_t group() const { return num_heads / num_kv_heads; }
  QWEN3VL_SHARED bool is_step() const { return num_tokens == 1; }
  // Rows of the cache that are visible to the last new token.
  QWEN3VL_SHARED int64_t length(int64_t sequence) const { return past_lengths[sequence] + num_tokens; }
  QWEN3VL_SHARED int64_t num_splits(int64_t sequence) const { return (length(sequence) + kSplitRows - 1) / kSplitRows; }
  QWEN3VL_SHARED int64_t num_blocks() const { return (num_tokens * group() + kBlockPairs - 1) / kBlockPairs; }
  QWEN3VL_SHARED bool is_copied() const { return past_key != present_key || past_value != present_value; }
  // Partial results are kept as H sums, the largest score, the sum of weights, padded to whole vectors.
  QWEN3VL_SHARED int64_t partial_floats() const { return head_dim + 16; }
  QWEN3VL_SHARED int64_t query_floats() const { return batch * num_tokens * num_heads * head_dim; }
  QWEN3VL_SHARED int64_t total_splits() const {
    int64_t total = 0;
    for (int64_t b = 0; b < batch; ++b) total += num_splits(b);
    return total;
  }
};

// What an instruction set gives.
using AttentionFunction = void (*)(const Attention& attention, int phase, int64_t task, void* scratch);

QWEN3VL_SHARED size_t attention_scratch_bytes(const Attention& a) {
  const int64_t partials = a.is_step() ? a.total_splits() * a.num_heads * a.partial_floats() : 0;
  return static_cast<size_t>(a.query_floats() + partials) * sizeof(float);
}

// Tasks of phase 0 that prepare tokens; those that copy the past's rows, one for each head, come after them.
QWEN3VL_SHARED int64_t attention_prepare_tasks(const Attention& a) {
  return (a.batch * a.num_tokens + kPreparedRows - 1) / kPreparedRows;
}

QWEN3VL_SHARED int64_t attention_num_tasks(const Attention& a, int phase) {
  if (phase == 0) return attention_prepare_tasks(a) + (a.is_copied() ? a.batch * a.num_kv_heads : 0);
  if (phase == 1) return a.num_kv_heads * (a.is_step() ? a.total_splits() : a.batch * a.num_blocks());
  if (!a.is_step()) return 0;
  const int64_t total = a.total_splits();
  if (total == a.batch) return 0;
  return total * a.num_heads <= kCombinedAtOnce ? 1 : a.batch;
}

}  // namespace qwen3vl
