// Phase 0 of the attention: norm and rotary embedding of queries and keys, new rows of the cache. Included by attention.h.

// RMSNorm(x) * weight, then the rotary embedding of the two halves; in float32, [H].
static void normalize_and_rotate(const Attention& a, const float* x, const float* weight, const float* cos,
                                 const float* sin, float* head) {
  const int64_t head_dim = a.head_dim, half = head_dim / 2;
  Lanes squares = zero();
  for (int64_t i = 0; i < head_dim; i += 16) squares = fma(load(x + i), load(x + i), squares);
  const float mean = reduce_add(squares) / static_cast<float>(head_dim);
  const Lanes factor = div(broadcast(1.0f), sqrt(broadcast(mean + a.epsilon)));
  for (int64_t i = 0; i < head_dim; i += 16) store(head + i, mul(mul(load(x + i), factor), load(weight + i)));
  int64_t h = 0;
  for (; h + 16 <= half; h += 16) {
    const Lanes c = load(cos + h), s = load(sin + h), first = load(head + h), second = load(head + half + h);
    store(head + h, sub(mul(first, c), mul(second, s)));
    store(head + half + h, add(mul(second, c), mul(first, s)));
  }
  if (h < half) {
    const int n = static_cast<int>(half - h);
    const Lanes c = load_n(cos + h, n), s = load_n(sin + h, n);
    const Lanes first = load_n(head + h, n), second = load_n(head + half + h, n);
    store_n(head + h, sub(mul(first, c), mul(second, s)), n);
    store_n(head + half + h, add(mul(second, c), mul(first, s)), n);
  }
}

template <class Cache>
static void append(const float* head, int64_t head_dim, int64_t kv_head, const float* scales, typename Cache::Element* row) {
  for (int64_t h = 0; h < head_dim; h += 16) {
    Lanes channels = load(head + h);
    if constexpr (Cache::kHasScales) channels = div(channels, load(scales + kv_head * head_dim + h));
    Cache::store(row, h, channels);
  }
}

// Token `token` of B * S. Queries are kept times the scale of the scores and, because a product with codes of keys is
// to be a product with keys, times the scales of the keys.
template <class Cache>
static void prepare_token(const Attention& a, int64_t token, float* queries) {
  const int64_t head_dim = a.head_dim, sequence = token / a.num_tokens;
  const int64_t position = a.past_lengths[sequence] + token % a.num_tokens;
  const float* x = a.qkv + token * (a.num_heads + 2 * a.num_kv_heads) * head_dim;
  const float* cos = a.cos + token * (head_dim / 2);
  const float* sin = a.sin + token * (head_dim / 2);
  float* q = queries + token * a.num_heads * head_dim;
  for (int64_t n = 0; n < a.num_heads; ++n, x += head_dim, q += head_dim) {
    normalize_and_rotate(a, x, a.q_norm, cos, sin, q);
    const int64_t kv_head = n / a.group();
    for (int64_t h = 0; h < head_dim; h += 16) {
      Lanes channels = mul(load(q + h), broadcast(a.scale));
      if constexpr (Cache::kHasScales) channels = mul(channels, load(a.key_scales + kv_head * head_dim + h));
      store(q + h, channels);
    }
  }
  const int64_t row = position * Cache::elements(head_dim);
  for (int64_t k = 0; k < a.num_kv_heads; ++k, x += head_dim) {
    float head[kMaxHeadDim];
    normalize_and_rotate(a, x, a.k_norm, cos, sin, head);
    append<Cache>(head, head_dim, k, a.key_scales, rows_of<Cache>(a, a.present_key, sequence, k) + row);
  }
  for (int64_t k = 0; k < a.num_kv_heads; ++k, x += head_dim) {
    append<Cache>(x, head_dim, k, a.value_scales, rows_of<Cache>(a, a.present_value, sequence, k) + row);
  }
}

// The rows that the past holds, where the present is other memory.
template <class Cache>
static void copy_past(const Attention& a, int64_t sequence, int64_t kv_head) {
  const size_t bytes = static_cast<size_t>(a.past_lengths[sequence] * Cache::elements(a.head_dim)) *
                       sizeof(typename Cache::Element);
  const void* pasts[2] = {a.past_key, a.past_value};
  void* presents[2] = {a.present_key, a.present_value};
  for (int i = 0; i < 2; ++i) {
    if (pasts[i] == presents[i]) continue;
    __builtin_memcpy(rows_of<Cache>(a, presents[i], sequence, kv_head), rows_of<Cache>(a, pasts[i], sequence, kv_head),
                     bytes);
  }
}

template <class Cache>
static void prepare(const Attention& a, int64_t task, float* queries) {
  const int64_t num_prepare = attention_prepare_tasks(a);
  if (task >= num_prepare) {
    copy_past<Cache>(a, (task - num_prepare) / a.num_kv_heads, (task - num_prepare) % a.num_kv_heads);
    return;
  }
  const int64_t first = task * kPreparedRows, all = a.batch * a.num_tokens;
  const int64_t last = first + kPreparedRows < all ? first + kPreparedRows : all;
  for (int64_t token = first; token < last; ++token) prepare_token<Cache>(a, token, queries);
}
