// How the cache keeps its elements: for each type of cache, 16 channels of a row to and from float lanes.
// Included by attention.h.
//
//   Element, elements(H)             what rows are made of, and how many of them hold H channels
//   load(row, channel)               16 channels from `channel` on, a multiple of 16; without the scales
//   store(row, channel, a)
//   kHasScales                       a channel is its code times its scale
//   kIsFloat                         rows are float32 already, so they need no conversion

struct Float32Cache {
  using Element = float;
  static constexpr bool kHasScales = false, kIsFloat = true;
  static int64_t elements(int64_t head_dim) { return head_dim; }
  QWEN3VL_INLINE Lanes load(const float* row, int64_t channel) { return QWEN3VL_ISA::load(row + channel); }
  QWEN3VL_INLINE void store(float* row, int64_t channel, Lanes a) { QWEN3VL_ISA::store(row + channel, a); }
};

struct Float16Cache {
  using Element = uint16_t;
  static constexpr bool kHasScales = false, kIsFloat = false;
  static int64_t elements(int64_t head_dim) { return head_dim; }
  QWEN3VL_INLINE Lanes load(const uint16_t* row, int64_t channel) { return load_float16(row + channel); }
  QWEN3VL_INLINE void store(uint16_t* row, int64_t channel, Lanes a) { store_float16(row + channel, a); }
};

struct Int8Cache {
  using Element = int8_t;
  static constexpr bool kHasScales = true, kIsFloat = false;
  static int64_t elements(int64_t head_dim) { return head_dim; }
  QWEN3VL_INLINE Lanes load(const int8_t* row, int64_t channel) { return load_int8(row + channel); }
  QWEN3VL_INLINE void store(int8_t* row, int64_t channel, Lanes a) { store_int8(row + channel, a); }
};

struct Int4Cache {
  using Element = uint8_t;
  static constexpr bool kHasScales = true, kIsFloat = false;
  static int64_t elements(int64_t head_dim) { return head_dim / 2; }
  QWEN3VL_INLINE Lanes load(const uint8_t* row, int64_t channel) { return load_int4(row + channel / 2); }
  QWEN3VL_INLINE void store(uint8_t* row, int64_t channel, Lanes a) { store_int4(row + channel / 2, a); }
};

// The rows of one head of one sequence in a cache tensor [B, K, T, H].
template <class Cache>
static inline int64_t first_element(const Attention& a, int64_t sequence, int64_t kv_head) {
  return (sequence * a.num_kv_heads + kv_head) * a.capacity * Cache::elements(a.head_dim);
}

template <class Cache>
static inline const typename Cache::Element* rows_of(const Attention& a, const void* cache, int64_t sequence,
                                                     int64_t kv_head) {
  return static_cast<const typename Cache::Element*>(cache) + first_element<Cache>(a, sequence, kv_head);
}

template <class Cache>
static inline typename Cache::Element* rows_of(const Attention& a, void* cache, int64_t sequence, int64_t kv_head) {
  return static_cast<typename Cache::Element*>(cache) + first_element<Cache>(a, sequence, kv_head);
}

// Rows as float32, [num_rows, H]: the rows themselves, or the buffer that they are converted into.
template <class Cache>
static inline const float* as_float(const typename Cache::Element* rows, int64_t num_rows, int64_t head_dim, float* buffer) {
  if constexpr (Cache::kIsFloat) {
    return rows;
  } else {
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t h = 0; h < head_dim; h += 16) {
        store(buffer + row * head_dim + h, Cache::load(rows + row * Cache::elements(head_dim), h));
      }
    }
    return buffer;
  }
}
