// One new token: rows of the cache in splits, each by one task, then the splits put together. Included by attention.h.
//
// Splits and chunks begin at fixed rows of the cache, so their sums have the same order whoever shares the step.

constexpr int64_t kChunkRows = 64;  // rows whose scores are taken at once
constexpr int64_t kHeadsAtOnce = 16;  // query heads of a key-value head that one pass over its rows takes

// scores(g, r) of G queries [G, H] and R rows, kChunkRows apart.
template <class Cache, int G, int R>
QWEN3VL_INLINE void score_rows(const float* queries, const typename Cache::Element* rows, int64_t head_dim, float* scores) {
  const int64_t row_elements = Cache::elements(head_dim);
  Lanes sums[G][R];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[g][r] = zero();
  }
  for (int64_t h = 0; h < head_dim; h += 16) {
    Lanes q[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) q[g] = load(queries + g * head_dim + h);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes keys = Cache::load(rows + r * row_elements, h);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[g][r] = fma(q[g], keys, sums[g][r]);
    }
  }
  if constexpr (G * R == 16) {
    float all[16];
    store(all, reduce_add_16(&sums[0][0]));
    for (int g = 0; g < G; ++g) __builtin_memcpy(scores + g * kChunkRows, all + g * R, R * sizeof(float));
  } else {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) scores[g * kChunkRows + r] = reduce_add(sums[g][r]);
    }
  }
}

// sums(g) += weights(g, r) * row r, in the order of the rows.
template <class Cache, int G, int R>
QWEN3VL_INLINE void add_rows(const float* weights, const typename Cache::Element* rows, int64_t head_dim, float* sums) {
  const int64_t row_elements = Cache::elements(head_dim);
  Lanes factors[G][R];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factors[g][r] = broadcast(weights[g * kChunkRows + r]);
  }
  for (int64_t h = 0; h < head_dim; h += 16) {
    Lanes sum[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sum[g] = load(sums + g * head_dim + h);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes values = Cache::load(rows + r * row_elements, h);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g] = fma(factors[g][r], values, sum[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(sums + g * head_dim + h, sum[g]);
  }
}

// What a task reads next, [num_rows] of so many bytes: fetched in step with what it computes meanwhile. The processor
// fetches ahead by itself, but begins anew where a task goes on from keys to values or back.
struct Ahead {
  const char* rows;
  int64_t num_rows, row_bytes;

  QWEN3VL_MEMBER void fetch(int64_t first, int64_t last) const {
    const int64_t end = (last < num_rows ? last : num_rows) * row_bytes;
    for (int64_t byte = first * row_bytes; byte < end; byte += 64) __builtin_prefetch(rows + byte, 0, 2);
  }
};

// Heads and rows of the cache that are taken together, whose sums the registers hold. More rows for fewer heads were
// slower from memory.
constexpr int kHeadsTogether = kRegisterLanes >= 32 ? 4 : 2;
constexpr int kRowsTogether = kRegisterLanes >= 32 ? 4 : 2;

template <class Cache, int G, int R>
static void score_chunk(const float* queries, const typename Cache::Element* rows, int64_t num_rows, int64_t head_dim,
                        const Ahead& ahead, float* scores) {
  const int64_t row_elements = Cache::elements(head_dim);
  int64_t row = 0;
  for (; row + R <= num_rows; row += R) {
    ahead.fetch(row, row + R);
    score_rows<Cache, G, R>(queries, rows + row * row_elements, head_dim, scores + row);
  }
  if constexpr (R > 1) {
    score_chunk<Cache, G, 1>(queries, rows + row * row_elements, num_rows - row, head_dim, Ahead{}, scores + row);
  }
}

template <class Cache, int G, int R>
static void add_chunk(const float* weights, const typename Cache::Element* rows, int64_t num_rows, int64_t head_dim,
                      const Ahead& ahead, float* sums) {
  const int64_t row_elements = Cache::elements(head_dim);
  int64_t row = 0;
  for (; row + R <= num_rows; row += R) {
    ahead.fetch(row, row + R);
    add_rows<Cache, G, R>(weights + row, rows + row * row_elements, head_dim, sums);
  }
  if constexpr (R > 1) {
    add_chunk<Cache, G, 1>(weights + row, rows + row * row_elements, num_rows - row, head_dim, Ahead{}, sums);
  }
}

// All heads, G of them together, then half as many; what comes next is fetched beside the first.
template <class Cache, int G>
static void score_heads(const float* queries, int64_t num_heads, const typename Cache::Element* rows, int64_t num_rows,
                        int64_t head_dim, Ahead ahead, float* scores) {
  int64_t g = 0;
  for (; g + G <= num_heads; g += G) {
    score_chunk<Cache, G, kRowsTogether>(queries + g * head_dim, rows, num_rows, head_dim, ahead, scores + g * kChunkRows);
    ahead = {};
  }
  if constexpr (G > 1) {
    score_heads<Cache, G / 2>(queries + g * head_dim, num_heads - g, rows, num_rows, head_dim, ahead, scores + g * kChunkRows);
  }
}

template <class Cache, int G>
static void add_heads(const float* weights, int64_t num_heads, const typename Cache::Element* rows, int64_t num_rows,
                      int64_t head_dim, Ahead ahead, float* sums) {
  int64_t g = 0;
  for (; g + G <= num_heads; g += G) {
    add_chunk<Cache, G, kRowsTogether>(weights + g * kChunkRows, rows, num_rows, head_dim, ahead, sums + g * head_dim);
    ahead = {};
  }
  if constexpr (G > 1) {
    add_heads<Cache, G / 2>(weights + g * kChunkRows, num_heads - g, rows, num_rows, head_dim, ahead, sums + g * head_dim);
  }
}

// The online softmax of up to kHeadsAtOnce query heads: sums of weighted values, largest scores, sums of weights.
struct Partial {
  float sums[kHeadsAtOnce * kMaxHeadDim];
  float largest[kHeadsAtOnce];
  Lanes weights[kHeadsAtOnce];  // the sum of weights, by row modulo 16
};

// Turn the scores of one head into weights; scale what was summed before by the change of the largest score.
static void weigh_chunk(Partial& partial, int64_t g, float* scores, int64_t num_rows, int64_t head_dim) {
  const Lanes lowest = broadcast(-__builtin_inff());
  Lanes largest = broadcast(partial.largest[g]);
  for (int64_t row = 0; row < kChunkRows; row += 16) {
    const int64_t left = num_rows - row < 0 ? 0 : num_rows - row;
    const Lanes visible = first_n(left < 16 ? static_cast<int>(left) : 16, load(scores + row), lowest);
    store(scores + row, visible);
    largest = max(largest, visible);
  }
  const float new_largest = reduce_max(largest);
  const Lanes offset = broadcast(new_largest);
  const Lanes change = exp(sub(broadcast(partial.largest[g]), offset));
  Lanes weights = mul(partial.weights[g], change);
  for (int64_t row = 0; row < kChunkRows; row += 16) {
    const Lanes weight = exp(sub(load(scores + row), offset));
    store(scores + row, weight);
    weights = add(weights, weight);
  }
  partial.weights[g] = weights;
  if (new_largest != partial.largest[g]) {
    float* sums = partial.sums + g * head_dim;
    for (int64_t h = 0; h < head_dim; h += 16) store(sums + h, mul(load(sums + h), change));
  }
  partial.largest[g] = new_largest;
}

// A chunk of rows for up to kHeadsAtOnce query heads; meanwhile, the values are fetched and then the keys of the next chunk.
template <class Cache>
static void attend_chunk(const float* queries, int64_t num_heads, const typename Cache::Element* keys,
                         const typename Cache::Element* values, int64_t num_rows, int64_t head_dim,
                         const Ahead& next_values, const Ahead& next_keys, Partial& partial) {
  float scores[kHeadsAtOnce * kChunkRows];
  score_heads<Cache, kHeadsTogether>(queries, num_heads, keys, num_rows, head_dim, next_values, scores);
  for (int64_t g = 0; g < num_heads; ++g) weigh_chunk(partial, g, scores + g * kChunkRows, num_rows, head_dim);
  add_heads<Cache, kHeadsTogether>(scores, num_heads, values, num_rows, head_dim, next_keys, partial.sums);
}

// Rows [first, last) of one key-value head for up to kHeadsAtOnce of its query heads.
template <class Cache>
static void attend_rows(const float* queries, int64_t num_heads, const typename Cache::Element* keys,
                        const typename Cache::Element* values, int64_t first, int64_t last, int64_t head_dim,
                        Partial& partial) {
  for (int64_t g = 0; g < num_heads; ++g) {
    partial.largest[g] = -__builtin_inff();
    partial.weights[g] = zero();
    for (int64_t h = 0; h < head_dim; h += 16) store(partial.sums + g * head_dim + h, zero());
  }
  const int64_t row_elements = Cache::elements(head_dim);
  const int64_t row_bytes = row_elements * int64_t{sizeof(typename Cache::Element)};
  for (int64_t row = first; row < last; row += kChunkRows) {
    const int64_t left = last - row, num_rows = left < kChunkRows ? left : kChunkRows;
    const typename Cache::Element* chunk_keys = keys + row * row_elements;
    const typename Cache::Element* chunk_values = values + row * row_elements;
    const Ahead next_values = {reinterpret_cast<const char*>(chunk_values), num_rows, row_bytes};
    const Ahead next_keys = {reinterpret_cast<const char*>(chunk_keys) + num_rows * row_bytes, left - num_rows, row_bytes};
    attend_chunk<Cache>(queries, num_heads, chunk_keys, chunk_values, num_rows, head_dim, next_values, next_keys, partial);
  }
}

// out = sums / weights, times the scales of the values.
template <class Cache>
static void write_head(const Attention& a, const float* sums, float weights, int64_t sequence, int64_t head) {
  const Lanes factor = div(broadcast(1.0f), broadcast(weights));
  const float* scales = Cache::kHasScales ? a.value_scales + head / a.group() * a.head_dim : nullptr;
  float* out = a.out + (sequence * a.num_heads + head) * a.head_dim;
  for (int64_t h = 0; h < a.head_dim; h += 16) {
    Lanes channels = mul(load(sums + h), factor);
    if constexpr (Cache::kHasScales) channels = mul(channels, load(scales + h));
    store(out + h, channels);
  }
}

// Where the partial results of a sequence begin: [N, its splits, partial_floats].
static inline float* partials_of(const Attention& a, int64_t splits_before, float* partials) {
  return partials + splits_before * a.num_heads * a.partial_floats();
}

template <class Cache>
static void attend_split(const Attention& a, int64_t task, const float* queries, float* partials) {
  int64_t sequence = 0, splits_before = 0;
  while (task >= (splits_before + a.num_splits(sequence)) * a.num_kv_heads) splits_before += a.num_splits(sequence++);
  const int64_t num_splits = a.num_splits(sequence), head_dim = a.head_dim;
  const int64_t kv_head = (task - splits_before * a.num_kv_heads) / num_splits;
  const int64_t split = (task - splits_before * a.num_kv_heads) % num_splits;
  const int64_t first = split * kSplitRows, length = a.length(sequence);
  const int64_t last = first + kSplitRows < length ? first + kSplitRows : length;
  const typename Cache::Element* keys = rows_of<Cache>(a, static_cast<const void*>(a.present_key), sequence, kv_head);
  const typename Cache::Element* values = rows_of<Cache>(a, static_cast<const void*>(a.present_value), sequence, kv_head);
  Partial partial;
  for (int64_t g = 0; g < a.group(); g += kHeadsAtOnce) {
    const int64_t num_heads = a.group() - g < kHeadsAtOnce ? a.group() - g : kHeadsAtOnce;
    const int64_t head = kv_head * a.group() + g;
    attend_rows<Cache>(queries + (sequence * a.num_heads + head) * head_dim, num_heads, keys, values, first, last,
                       head_dim, partial);
    for (int64_t i = 0; i < num_heads; ++i) {
      const float weights = reduce_add(partial.weights[i]);
      const float* sums = partial.sums + i * head_dim;
      if (num_splits == 1) {
        write_head<Cache>(a, sums, weights, sequence, head + i);
        continue;
      }
      float* kept = partials_of(a, splits_before, partials) + ((head + i) * num_splits + split) * a.partial_floats();
      for (int64_t h = 0; h < head_dim; h += 16) store(kept + h, load(sums + h));
      kept[head_dim] = partial.largest[i];
      kept[head_dim + 1] = weights;
    }
  }
}

template <class Cache>
static void combine_head(const Attention& a, int64_t sequence, int64_t head, const float* partials) {
  const int64_t num_splits = a.num_splits(sequence), stride = a.partial_floats(), head_dim = a.head_dim;
  Lanes largest = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < num_splits; ++i) largest = max(largest, broadcast(partials[i * stride + head_dim]));
  float sums[kMaxHeadDim];
  for (int64_t h = 0; h < head_dim; h += 16) store(sums + h, zero());
  Lanes weights = zero();
  for (int64_t i = 0; i < num_splits; ++i) {
    const float* partial = partials + i * stride;
    const Lanes factor = exp(sub(broadcast(partial[head_dim]), largest));
    weights = fma(broadcast(partial[head_dim + 1]), factor, weights);
    for (int64_t h = 0; h < head_dim; h += 16) store(sums + h, fma(load(partial + h), factor, load(sums + h)));
  }
  write_head<Cache>(a, sums, reduce_max(weights), sequence, head);
}

// One sequence, or all of them in one task.
template <class Cache>
static void combine(const Attention& a, int64_t task, float* partials) {
  const bool is_alone = attention_num_tasks(a, 2) == 1;
  int64_t splits_before = 0;
  for (int64_t sequence = 0; sequence < a.batch; splits_before += a.num_splits(sequence++)) {
    const int64_t num_splits = a.num_splits(sequence);
    if (num_splits == 1 || (!is_alone && sequence != task)) continue;
    const float* of_sequence = partials_of(a, splits_before, partials);
    for (int64_t head = 0; head < a.num_heads; ++head) {
      combine_head<Cache>(a, sequence, head, of_sequence + head * num_splits * a.partial_floats());
    }
  }
}
