// Several new tokens: blocks of pairs of a token and a query head, each by one task. Included by attention.h.
//
// Pairs lie in lanes, keys and channels are broadcast: so keys and values are read as the cache holds them, the softmax is
// lane by lane, and what a pair gets does not depend on the block that it lies in. Pairs are in the order of the tokens,
// so those that do not see a row of the cache are the first of a block.

// R rows of the cache by C vectors of pairs: scores [R, kBlockPairs] of queries [H, kBlockPairs].
template <int R, int C>
QWEN3VL_INLINE void score_tile(const float* queries, const float* rows, int64_t head_dim, float* scores) {
  Lanes sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = zero();
  }
  for (int64_t h = 0; h < head_dim; ++h) {
    Lanes q[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) q[c] = load(queries + h * kBlockPairs + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes key = broadcast(rows[r * head_dim + h]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = fma(key, q[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(scores + r * kBlockPairs + 16 * c, sums[r][c]);
  }
}

// R channels by C vectors of pairs: sums = sums * change + weights [num_rows, kBlockPairs] * values.
template <int R, int C>
QWEN3VL_INLINE void value_tile(const float* weights, const float* values, int64_t num_rows, int64_t head_dim,
                               const float* change, float* sums) {
  Lanes sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = mul(load(sums + r * kBlockPairs + 16 * c), load(change + 16 * c));
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    Lanes w[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) w[c] = load(weights + row * kBlockPairs + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes value = broadcast(values[row * head_dim + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(value, w[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sums + r * kBlockPairs + 16 * c, sum[r][c]);
  }
}

// Rows of the tile that takes what tiles of R rows leave.
constexpr int rest_of(int rows) { return rows % 4 == 0 ? rows / 2 : rows > 2 ? 2 : 1; }

template <int R, int C>
static void score_tiles(const float* queries, const float* rows, int64_t num_rows, int64_t head_dim, float* scores) {
  int64_t row = 0;
  for (; row + R <= num_rows; row += R) {
    score_tile<R, C>(queries, rows + row * head_dim, head_dim, scores + row * kBlockPairs);
  }
  if constexpr (R > 1) {
    score_tiles<rest_of(R), C>(queries, rows + row * head_dim, num_rows - row, head_dim, scores + row * kBlockPairs);
  }
}

template <int R, int C>
static void value_tiles(const float* weights, const float* values, int64_t num_rows, int64_t channels, int64_t head_dim,
                        const float* change, float* sums) {
  int64_t h = 0;
  for (; h + R <= channels; h += R) {
    value_tile<R, C>(weights, values + h, num_rows, head_dim, change, sums + h * kBlockPairs);
  }
  if constexpr (R > 1) {
    value_tiles<rest_of(R), C>(weights, values + h, num_rows, channels - h, head_dim, change, sums + h * kBlockPairs);
  }
}

// Rows of the tiles of C vectors: so many that their sums fit the registers, beside the vectors and one broadcast.
constexpr int tile_rows(int vectors) { return kRegisterLanes < 32 ? 6 : vectors == 4 ? 4 : 8; }

// Tiles of four vectors where their sums fit the registers, of one where they do not.
static void score_block(const float* queries, int64_t num_vectors, const float* rows, int64_t num_rows, int64_t head_dim,
                        float* scores) {
  int64_t c = 0;
  if constexpr (kRegisterLanes >= 32) {
    for (; c + 4 <= num_vectors; c += 4) {
      score_tiles<tile_rows(4), 4>(queries + 16 * c, rows, num_rows, head_dim, scores + 16 * c);
    }
    for (; c + 2 <= num_vectors; c += 2) {
      score_tiles<tile_rows(2), 2>(queries + 16 * c, rows, num_rows, head_dim, scores + 16 * c);
    }
  }
  for (; c < num_vectors; ++c) {
    score_tiles<tile_rows(1), 1>(queries + 16 * c, rows, num_rows, head_dim, scores + 16 * c);
  }
}

static void value_block(const float* weights, int64_t num_vectors, const float* rows, int64_t num_rows, int64_t head_dim,
                        const float* change, float* sums) {
  int64_t c = 0;
  if constexpr (kRegisterLanes >= 32) {
    for (; c + 4 <= num_vectors; c += 4) {
      value_tiles<tile_rows(4), 4>(weights + 16 * c, rows, num_rows, head_dim, head_dim, change + 16 * c, sums + 16 * c);
    }
    for (; c + 2 <= num_vectors; c += 2) {
      value_tiles<tile_rows(2), 2>(weights + 16 * c, rows, num_rows, head_dim, head_dim, change + 16 * c, sums + 16 * c);
    }
  }
  for (; c < num_vectors; ++c) {
    value_tiles<tile_rows(1), 1>(weights + 16 * c, rows, num_rows, head_dim, head_dim, change + 16 * c, sums + 16 * c);
  }
}

// What one task keeps; a pair has a lane.
struct Block {
  int64_t sequence, kv_head;
  int64_t first_pair, num_pairs, num_vectors;
  float queries[kMaxHeadDim * kBlockPairs];
  float sums[kMaxHeadDim * kBlockPairs];
  float scores[kChunkRows * kBlockPairs];
  float rows[kChunkRows * kMaxHeadDim];  // of the cache, where they are not float32
  float largest[kBlockPairs];
  float weights[kBlockPairs];
  float change[kBlockPairs];
};

// Where the head of a pair begins in a tensor [B, S, N, H].
static inline int64_t offset_of_pair(const Attention& a, const Block& block, int64_t pair) {
  const int64_t token = block.sequence * a.num_tokens + pair / a.group();
  return (token * a.num_heads + block.kv_head * a.group() + pair % a.group()) * a.head_dim;
}

static void begin_block(const Attention& a, const float* queries, Block& block) {
  for (int64_t c = 0; c < block.num_vectors; ++c) {
    store(block.largest + 16 * c, broadcast(-__builtin_inff()));
    store(block.weights + 16 * c, zero());
    const int64_t left = block.num_pairs - 16 * c < 16 ? block.num_pairs - 16 * c : 16;
    const float* from[16];
    for (int64_t i = 0; i < left; ++i) from[i] = queries + offset_of_pair(a, block, block.first_pair + 16 * c + i);
    for (int64_t h = 0; h < a.head_dim; h += 16) {
      Lanes heads[16];
      for (int64_t i = 0; i < 16; ++i) heads[i] = i < left ? load(from[i] + h) : zero();
      transpose(heads);
      for (int64_t i = 0; i < 16; ++i) {
        store(block.queries + (h + i) * kBlockPairs + 16 * c, heads[i]);
        store(block.sums + (h + i) * kBlockPairs + 16 * c, zero());
      }
    }
  }
}

// Turn the scores of rows first_row ... into weights; rows after a pair's own token weigh nothing.
static void weigh_block(const Attention& a, Block& block, int64_t first_row, int64_t num_rows) {
  const Lanes lowest = broadcast(-__builtin_inff());
  const int64_t new_row = first_row - a.past_lengths[block.sequence];  // below 0 where the chunk begins in the past
  for (int64_t c = 0; c < block.num_vectors; ++c) {
    const Lanes before = load(block.largest + 16 * c);
    Lanes largest = before;
    for (int64_t row = 0; row < num_rows; ++row) {
      float* scores = block.scores + row * kBlockPairs + 16 * c;
      const int64_t hidden = (new_row + row) * a.group() - block.first_pair - 16 * c;
      Lanes visible = load(scores);
      if (hidden > 0) {
        visible = first_n(hidden < 16 ? static_cast<int>(hidden) : 16, lowest, visible);
        store(scores, visible);
      }
      largest = max_number(largest, visible);
    }
    const Lanes change = exp(sub(before, largest));
    Lanes weights = mul(load(block.weights + 16 * c), change);
    for (int64_t row = 0; row < num_rows; ++row) {
      float* scores = block.scores + row * kBlockPairs + 16 * c;
      const Lanes weight = exp(sub(load(scores), largest));
      store(scores, weight);
      weights = add(weights, weight);
    }
    store(block.largest + 16 * c, largest);
    store(block.weights + 16 * c, weights);
    store(block.change + 16 * c, change);
  }
}

template <class Cache>
static void write_block(const Attention& a, const Block& block) {
  const float* scales = Cache::kHasScales ? a.value_scales + block.kv_head * a.head_dim : nullptr;
  for (int64_t c = 0; c < block.num_vectors; ++c) {
    const Lanes factor = div(broadcast(1.0f), load(block.weights + 16 * c));
    const int64_t left = block.num_pairs - 16 * c < 16 ? block.num_pairs - 16 * c : 16;
    float* to[16];
    for (int64_t i = 0; i < left; ++i) to[i] = a.out + offset_of_pair(a, block, block.first_pair + 16 * c + i);
    for (int64_t h = 0; h < a.head_dim; h += 16) {
      Lanes channels[16];
      for (int64_t i = 0; i < 16; ++i) {
        channels[i] = mul(load(block.sums + (h + i) * kBlockPairs + 16 * c), factor);
        if constexpr (Cache::kHasScales) channels[i] = mul(channels[i], broadcast(scales[h + i]));
      }
      transpose(channels);
      for (int64_t i = 0; i < left; ++i) store(to[i] + h, channels[i]);
    }
  }
}

// Tasks of one key-value head lie together, the longest first: so its rows stay in a core's cache, and no thread is left
// with a long task at the end.
template <class Cache>
static void attend_block(const Attention& a, int64_t task, const float* queries) {
  const int64_t num_blocks = a.num_blocks(), head_dim = a.head_dim, row_elements = Cache::elements(head_dim);
  const int64_t num_pairs = a.num_tokens * a.group();
  const int64_t row_bytes = row_elements * int64_t{sizeof(typename Cache::Element)};
  Block block;
  block.sequence = task / num_blocks / a.num_kv_heads;
  block.kv_head = task / num_blocks % a.num_kv_heads;
  block.first_pair = (num_blocks - 1 - task % num_blocks) * kBlockPairs;
  block.num_pairs = num_pairs - block.first_pair < kBlockPairs ? num_pairs - block.first_pair : kBlockPairs;
  block.num_vectors = (block.num_pairs + 15) / 16;
  begin_block(a, queries, block);
  const int64_t last_token = (block.first_pair + block.num_pairs - 1) / a.group();
  const int64_t length = a.past_lengths[block.sequence] + last_token + 1;
  const auto* keys = rows_of<Cache>(a, static_cast<const void*>(a.present_key), block.sequence, block.kv_head);
  const auto* values = rows_of<Cache>(a, static_cast<const void*>(a.present_value), block.sequence, block.kv_head);
  for (int64_t row = 0; row < length; row += kChunkRows) {
    const int64_t num_rows = length - row < kChunkRows ? length - row : kChunkRows;
    const int64_t left = length - row - num_rows;
    Ahead{reinterpret_cast<const char*>(values + row * row_elements), num_rows, row_bytes}.fetch(0, num_rows);
    const float* float_keys = as_float<Cache>(keys + row * row_elements, num_rows, head_dim, block.rows);
    score_block(block.queries, block.num_vectors, float_keys, num_rows, head_dim, block.scores);
    weigh_block(a, block, row, num_rows);
    Ahead{reinterpret_cast<const char*>(keys + (row + num_rows) * row_elements), left, row_bytes}.fetch(0, kChunkRows);
    const float* float_values = as_float<Cache>(values + row * row_elements, num_rows, head_dim, block.rows);
    value_block(block.scores, block.num_vectors, float_values, num_rows, head_dim, block.change, block.sums);
  }
  write_block<Cache>(a, block);
}
