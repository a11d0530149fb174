// Checks the attention of all instruction sets that this CPU has: against sums in float64, and for the same bits.
//
//   FLAGS='-std=c++17 -O2 -ffp-contract=off -fno-exceptions -fno-rtti'
//   compile() { g++ $FLAGS "${@:2}" -c native/tests/attention_isa.cpp -o "/tmp/attention_$1.o"; }
//   compile portable -DTEST_PORTABLE
//   compile avx2 -mavx2 -mfma -mf16c
//   compile avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
//   g++ $FLAGS native/tests/attention_check.cpp /tmp/attention_*.o -lm -o /tmp/attention_check && /tmp/attention_check
#include "attention_case.h"

static int failures = 0;
static double largest_error = 0, largest_row_error = 0;

static void expect(bool is_right, const char* what, const Case& c, const char* isa) {
  if (is_right) return;
  if (++failures > 20) return;
  printf("failed: %s (%s, type %d, B %lld, S %lld, N %lld, K %lld, H %lld, T %lld, past", what, isa,
         static_cast<int>(c.a.cache_type), static_cast<long long>(c.a.batch), static_cast<long long>(c.a.num_tokens),
         static_cast<long long>(c.a.num_heads), static_cast<long long>(c.a.num_kv_heads),
         static_cast<long long>(c.a.head_dim), static_cast<long long>(c.a.capacity));
  for (int64_t b = 0; b < c.a.batch; ++b) printf(" %lld", static_cast<long long>(c.past[b]));
  printf(")\n");
}

// A channel of the cache, as the attention sees it.
static double channel_of(const Case& c, const void* cache, const float* scales, int64_t b, int64_t k, int64_t row, int64_t h) {
  const int64_t index = ((b * c.a.num_kv_heads + k) * c.a.capacity + row) * c.a.head_dim + h;
  const int64_t scale = k * c.a.head_dim + h;
  switch (c.a.cache_type) {
    case CacheType::kFloat32:
      return static_cast<const float*>(cache)[index];
    case CacheType::kFloat16:
      return from_half_bits(static_cast<const uint16_t*>(cache)[index]);
    case CacheType::kInt8:
      return static_cast<double>(static_cast<const int8_t*>(cache)[index]) * scales[scale];
    case CacheType::kInt4:
      return static_cast<double>((static_cast<const uint8_t*>(cache)[index / 2] >> (index % 2 * 4)) % 16 - 8) * scales[scale];
  }
  return NAN;
}

static void expected_head(const Case& c, int64_t token, const float* x, const float* weight, double* head) {
  const int64_t head_dim = c.a.head_dim, half = head_dim / 2;
  double squares = 0;
  for (int64_t h = 0; h < head_dim; ++h) squares += static_cast<double>(x[h]) * x[h];
  const double factor = 1 / sqrt(squares / static_cast<double>(head_dim) + c.a.epsilon);
  for (int64_t h = 0; h < half; ++h) {
    const double first = x[h] * factor * weight[h], second = x[h + half] * factor * weight[h + half];
    const double cosine = c.a.cos[token * half + h], sine = c.a.sin[token * half + h];
    head[h] = first * cosine - second * sine;
    head[h + half] = second * cosine + first * sine;
  }
}

// What a new row holds is the nearest that the cache can hold.
static void check_row(const Case& c, const char* isa, const double* right, const void* cache, const float* scales,
                      int64_t b, int64_t k, int64_t row) {
  for (int64_t h = 0; h < c.a.head_dim; ++h) {
    const double stored = channel_of(c, cache, scales, b, k, row, h);
    double step = 0, limit = right[h];
    if (c.a.cache_type == CacheType::kFloat16) step = ldexp(1.0, (right[h] == 0 ? -14 : fmax(ilogb(right[h]), -14)) - 10);
    if (c.a.cache_type == CacheType::kInt8 || c.a.cache_type == CacheType::kInt4) {
      step = scales[k * c.a.head_dim + h];
      const double highest = c.a.cache_type == CacheType::kInt8 ? 127 : 7;
      limit = fmax(fmin(right[h], highest * step), -(highest + 1) * step);
    }
    const double error = fabs(stored - limit) - step / 2;
    largest_row_error = error > largest_row_error ? error : largest_row_error;
    expect(error < 4e-6, "new row of the cache", c, isa);
  }
}

static void check_cache(const Case& c, const char* isa, const Memory& key_before, const Memory& value_before) {
  double head[kMaxHeadDim];
  for (int64_t b = 0; b < c.a.batch; ++b) {
    for (int64_t k = 0; k < c.a.num_kv_heads; ++k) {
      for (int64_t s = 0; s < c.a.num_tokens; ++s) {
        const int64_t token = b * c.a.num_tokens + s;
        const float* x = c.a.qkv + (token * (c.a.num_heads + 2 * c.a.num_kv_heads) + c.a.num_heads + k) * c.a.head_dim;
        expected_head(c, token, x, c.a.k_norm, head);
        check_row(c, isa, head, c.a.present_key, c.a.key_scales, b, k, c.past[b] + s);
        for (int64_t h = 0; h < c.a.head_dim; ++h) head[h] = x[c.a.num_kv_heads * c.a.head_dim + h];
        check_row(c, isa, head, c.a.present_value, c.a.value_scales, b, k, c.past[b] + s);
      }
      for (int64_t row = 0; row < c.a.capacity; ++row) {
        if (row >= c.past[b] && row < c.past[b] + c.a.num_tokens) continue;
        const size_t offset = static_cast<size_t>((b * c.a.num_kv_heads + k) * c.a.capacity + row) * c.row_bytes();
        if (row >= c.past[b] && c.a.is_copied()) continue;  // of other memory, nobody says what these hold
        const uint8_t *keys = static_cast<uint8_t*>(c.a.present_key), *values = static_cast<uint8_t*>(c.a.present_value);
        expect(memcmp(keys + offset, key_before.start + offset, c.row_bytes()) == 0, "other rows of the keys", c, isa);
        expect(memcmp(values + offset, value_before.start + offset, c.row_bytes()) == 0, "other rows of the values", c, isa);
      }
    }
  }
}

static void check_out(const Case& c, const char* isa) {
  double q[kMaxHeadDim], sums[kMaxHeadDim];
  double* weights = static_cast<double*>(malloc(static_cast<size_t>(c.a.capacity) * sizeof(double)));
  for (int64_t i = 0; i < c.a.batch * c.a.num_tokens * c.a.num_heads; ++i) {
    const int64_t token = i / c.a.num_heads, n = i % c.a.num_heads, k = n / c.a.group(), b = token / c.a.num_tokens;
    const int64_t length = c.past[b] + token % c.a.num_tokens + 1;
    expected_head(c, token, c.a.qkv + (token * (c.a.num_heads + 2 * c.a.num_kv_heads) + n) * c.a.head_dim, c.a.q_norm, q);
    double largest = -INFINITY, total = 0;
    for (int64_t row = 0; row < length; ++row) {
      double score = 0;
      for (int64_t h = 0; h < c.a.head_dim; ++h) score += q[h] * channel_of(c, c.a.present_key, c.a.key_scales, b, k, row, h);
      weights[row] = score * c.a.scale;
      largest = fmax(largest, weights[row]);
    }
    for (int64_t h = 0; h < c.a.head_dim; ++h) sums[h] = 0;
    for (int64_t row = 0; row < length; ++row) {
      const double weight = exp(weights[row] - largest);
      total += weight;
      for (int64_t h = 0; h < c.a.head_dim; ++h) {
        sums[h] += weight * channel_of(c, c.a.present_value, c.a.value_scales, b, k, row, h);
      }
    }
    for (int64_t h = 0; h < c.a.head_dim; ++h) {
      const double error = fabs(c.a.out[i * c.a.head_dim + h] - sums[h] / total);
      largest_error = error > largest_error ? error : largest_error;
      expect(error < 2e-5, "output", c, isa);
    }
  }
  free(weights);
}

static bool same(const Memory& a, const Memory& b) { return memcmp(a.start, b.start, a.bytes) == 0; }

// One case on all instruction sets: the portable one against float64, the others by their bits.
static void check_case(Case& c, Random& random, size_t shift, bool in_place) {
  c.make(random, shift, in_place);
  Memory key_before, value_before, out, key, value;
  key_before.make(c.cache_bytes(), 0);
  value_before.make(c.cache_bytes(), 0);
  out.make(c.out.bytes, 0);
  key.make(c.cache_bytes(), 0);
  value.make(c.cache_bytes(), 0);
  key_before.copy(c.key);
  value_before.copy(c.value);
  const Memory &present_key = in_place ? c.key : c.present_key, &present_value = in_place ? c.value : c.present_value;
  Isa list[4];
  const int count = isas(list);
  for (int i = 0; i < count; ++i) {
    c.key.copy(key_before);
    c.value.copy(value_before);
    memset(c.out.start, 0xff, c.out.bytes);
    memset(c.scratch.start, 0xff, c.scratch.bytes);
    c.run(list[i].attend, i, i % 2 == 1);
    if (i == 0) {
      check_cache(c, list[i].name, key_before, value_before);
      check_out(c, list[i].name);
      out.copy(c.out);
      key.copy(present_key);
      value.copy(present_value);
    }
    expect(same(out, c.out), "same bits of the output", c, list[i].name);
    expect(same(key, present_key) && same(value, present_value), "same bits of the cache", c, list[i].name);
  }
}

static void set_sizes(Case& c, CacheType type, int64_t batch, int64_t num_tokens, int64_t kv_heads, int64_t group, int64_t head_dim) {
  c.a = {};
  c.a.cache_type = type;
  c.a.batch = batch;
  c.a.num_tokens = num_tokens;
  c.a.num_kv_heads = kv_heads;
  c.a.num_heads = kv_heads * group;
  c.a.head_dim = head_dim;
  c.a.scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  c.a.epsilon = 1e-6f;
}

static constexpr CacheType kTypes[4] = {CacheType::kFloat32, CacheType::kFloat16, CacheType::kInt8, CacheType::kInt4};

static void check_random_cases(int count) {
  static const int64_t head_dims[] = {16, 48, 64, 80, 128, 256}, groups[] = {1, 2, 3, 4, 5, 8, 16, 17};
  Random random;
  for (int i = 0; i < count; ++i) {
    Case c;
    const int64_t num_tokens = random.below(2) ? 1 : 1 + random.below(random.below(3) ? 9 : 90);
    set_sizes(c, kTypes[i % 4], 1 + random.below(3), num_tokens, 1 + random.below(3), groups[random.below(8)],
              head_dims[random.below(6)]);
    c.a.capacity = num_tokens + 1;
    for (int64_t b = 0; b < c.a.batch; ++b) {
      c.past[b] = random.below(4) == 0 ? 0 : random.below(random.below(2) ? 70 : 600);
      if (c.past[b] + num_tokens > c.a.capacity) c.a.capacity = c.past[b] + num_tokens + random.below(2);
    }
    check_case(c, random, static_cast<size_t>(random.below(2)), random.below(2) == 0);
  }
}

static void check_ends_of_splits() {
  Random random;
  static const int64_t pasts[] = {0, 14, 15, 16, 62, 63, 64, 65, 254, 255, 256, 257, 511, 512, 767, 1100};
  for (int i = 0; i < 64; ++i) {
    Case c;
    set_sizes(c, kTypes[i / 16], 1, 1, 2, 2, 32);
    c.past[0] = pasts[i % 16];
    c.a.capacity = c.past[0] + 1;
    check_case(c, random, 1, true);
  }
}

// A sequence of a batch gives the bits that it gives alone; NaN in another one does not reach it.
static void check_company(int64_t num_tokens, CacheType type) {
  Random random;
  Case c, alone;
  set_sizes(c, type, 3, num_tokens, 2, 2, 64);
  c.a.capacity = 700;
  c.past[0] = 600;
  c.past[1] = 3;
  c.past[2] = 300;
  c.make(random, 0, true);
  set_sizes(alone, type, 1, num_tokens, 2, 2, 64);
  alone.a.capacity = 700;
  alone.past[0] = 300;
  alone.make(random, 0, true);
  memcpy(alone.qkv.start, c.qkv.start + 2 * alone.qkv.bytes, alone.qkv.bytes);
  memcpy(alone.cos.start, c.cos.start + 2 * alone.cos.bytes, alone.cos.bytes);
  memcpy(alone.sin.start, c.sin.start + 2 * alone.sin.bytes, alone.sin.bytes);
  memcpy(alone.key.start, c.key.start + 2 * alone.key.bytes, alone.key.bytes);
  memcpy(alone.value.start, c.value.start + 2 * alone.value.bytes, alone.value.bytes);
  alone.q_norm.copy(c.q_norm);
  alone.k_norm.copy(c.k_norm);
  alone.key_scales.copy(c.key_scales);
  alone.value_scales.copy(c.value_scales);
  c.qkv.as<float>()[5] = NAN;                                                                    // sequence 0, a query
  c.qkv.as<float>()[(num_tokens * 8 + c.a.num_heads + 2 * c.a.num_kv_heads - 1) * 64] = NAN;  // sequence 1, a value
  Isa list[4];
  const int count = isas(list);
  for (int i = 0; i < count; ++i) {
    c.run(list[i].attend);
    alone.run(list[i].attend);
    const size_t bytes = alone.out.bytes;
    expect(memcmp(alone.out.start, c.out.start + 2 * bytes, bytes) == 0, "bits of a sequence beside others", c, list[i].name);
    expect(isnan(c.a.out[0]), "NaN of a query", c, list[i].name);
    expect(!isnan(c.a.out[64]), "NaN of another head's query", c, list[i].name);
    const float of_value = c.a.out[num_tokens * 4 * 64 + 3 * 64];
    if (type == CacheType::kFloat32 || type == CacheType::kFloat16) {
      expect(isnan(of_value), "NaN of a value", c, list[i].name);
    } else {  // codes know no NaN
      expect(!isnan(of_value), "NaN of a value in codes", c, list[i].name);
    }
  }
}

// The first tokens of a longer input have the bits of a shorter input, and those of an input in pieces.
static void check_pieces() {
  Random random;
  Case whole, first, second;
  const int64_t lengths[3] = {75, 33, 42};
  Case* cases[3] = {&whole, &first, &second};
  for (int i = 0; i < 3; ++i) {
    set_sizes(*cases[i], CacheType::kFloat16, 1, lengths[i], 1, 3, 32);
    cases[i]->a.capacity = 200;
    cases[i]->past[0] = i == 2 ? 90 + 33 : 90;
    cases[i]->make(random, 0, true);
    cases[i]->q_norm.copy(whole.q_norm);
    cases[i]->k_norm.copy(whole.k_norm);
  }
  first.key.copy(whole.key);
  first.value.copy(whole.value);
  const Memory* wholes[3] = {&whole.qkv, &whole.cos, &whole.sin};
  const Memory* pieces[2][3] = {{&first.qkv, &first.cos, &first.sin}, {&second.qkv, &second.cos, &second.sin}};
  for (int i = 0; i < 3; ++i) {
    memcpy(pieces[0][i]->start, wholes[i]->start, pieces[0][i]->bytes);
    memcpy(pieces[1][i]->start, wholes[i]->start + pieces[0][i]->bytes, pieces[1][i]->bytes);
  }
  Isa list[4];
  const int count = isas(list);
  for (int i = 0; i < count; ++i) {
    whole.run(list[i].attend);
    first.run(list[i].attend);
    second.key.copy(first.key);
    second.value.copy(first.value);
    second.run(list[i].attend);
    expect(memcmp(whole.out.start, first.out.start, first.out.bytes) == 0, "first piece", whole, list[i].name);
    expect(memcmp(whole.out.start + first.out.bytes, second.out.start, second.out.bytes) == 0, "second piece", whole, list[i].name);
    expect(same(whole.key, second.key) && same(whole.value, second.value), "cache of pieces", whole, list[i].name);
  }
}

int main(int argc, char** argv) {
  check_random_cases(argc > 1 ? atoi(argv[1]) : 100);
  check_ends_of_splits();
  for (int i = 0; i < 4; ++i) {
    check_company(1, kTypes[i]);
    check_company(21, kTypes[i]);
  }
  check_pieces();
  Isa list[4];
  const int count = isas(list);
  for (int i = 0; i < count; ++i) printf("%s ", list[i].name);
  printf(": %d failures, largest error %.2e, of new rows %.2e\n", failures, largest_error, largest_row_error);
  return failures != 0;
}
