// Compares instruction sets with plain C++, bit by bit, without ONNX Runtime: also those that only an emulator runs.
//
//   -DCHECKED='&kAvx2,&kAvxVnni' names what is linked with this and isa_portable.cpp.
// tests/native/test_other_isas.py says how.
//
// Prints a hash of all results, which is the same on every processor.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "../kernels.h"

using namespace qwen3vl;

static const Kernels* const kChecked[] = {CHECKED};

static int failures = 0;
static long comparisons = 0;
static uint64_t hash = 1469598103934665603ull;

static uint32_t state = 12345;
static uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state ^ (state >> 13);
}
static float random_float(float range) { return (static_cast<float>(random_bits() >> 8) / 8388608.0f - 1.0f) * range; }
static int random_in(int lowest, int highest) {
  return lowest + static_cast<int>(random_bits() % static_cast<uint32_t>(highest - lowest + 1));
}

// Exactly as large as asked, so that a sanitizer sees what reads beyond it; aligned as the operators' memory is.
template <typename T>
struct Array {
  T* data;
  int64_t size;
  explicit Array(int64_t count) : data(nullptr), size(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(count) * sizeof(T) + (count == 0)) != 0) abort();
    data = static_cast<T*>(memory);
    memset(memory, 0, static_cast<size_t>(count) * sizeof(T));
  }
  Array(const Array&) = delete;
  ~Array() { free(data); }
  T& operator[](int64_t i) { return data[i]; }
  void fill(float range) {
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(random_float(range));
  }
};

// All NaN count as one: which of them an operation on two gives is each processor's own choice.
static float of_bits(float value) { return value == value ? value : 123456.0f; }

static void mix(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = of_bits(values[i]);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    hash = (hash ^ bits) * 1099511628211ull;
  }
}

static void compare(const float* right, const float* values, int64_t count, const char* isa, const char* what) {
  ++comparisons;
  for (int64_t i = 0; i < count; ++i) {
    const float a = of_bits(right[i]), b = of_bits(values[i]);
    if (memcmp(&a, &b, sizeof a) == 0) continue;
    if (++failures <= 20) {
      printf("%s: %s: element %lld is %.9g, not %.9g\n", isa, what, static_cast<long long>(i), static_cast<double>(b),
             static_cast<double>(a));
    }
    return;
  }
}

static void compare_bytes(const void* right, const void* values, int64_t count, const char* isa, const char* what) {
  ++comparisons;
  if (count == 0 || memcmp(right, values, static_cast<size_t>(count)) == 0) return;
  if (++failures <= 20) printf("%s: %s differs\n", isa, what);
}

// Scales between 2^-14 and 2^15, as bits of float16.
static uint16_t random_scale() { return static_cast<uint16_t>(random_in(1, 30) << 10 | random_in(0, 1023)); }

static double half_to_double(uint16_t half) { return ldexp(1024 + half % 1024, (half >> 10) - 25); }

// What is multiplied, and how.
struct Case {
  int64_t num_rows, num_columns, num_outputs;
  int bits, block;
  bool gated, has_norm, has_bias, has_residual, is_extreme;
};

struct Problem {
  Case c;
  Weight weight;
  Array<uint8_t> tiles;
  Array<float> x, norm, bias, residual;

  static Weight weight_of(const Case& c) { return {nullptr, c.num_outputs, c.num_columns, c.bits, c.block}; }

  explicit Problem(const Case& wanted)
      : c(wanted), weight(weight_of(wanted)), tiles(weight.num_tiles() * weight.tile_bytes()),
        x(wanted.num_rows * wanted.num_columns * (wanted.gated ? 2 : 1)), norm(wanted.num_columns),
        bias(wanted.num_outputs), residual(wanted.num_rows * wanted.num_outputs) {
    weight.tiles = tiles.data;
    for (int64_t i = 0; i < tiles.size; ++i) tiles[i] = c.is_extreme ? 255 : static_cast<uint8_t>(random_bits() >> 9);
    for (int64_t t = 0; t < weight.num_tiles(); ++t) {
      uint8_t* rest = tiles.data + t * weight.tile_bytes() + weight.num_blocks() * weight.block_bytes();
      const int64_t count = weight.num_blocks() * kTileRows;
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t scale = random_scale();
        memcpy(rest + 2 * i, &scale, sizeof scale);
        const int highest = (1 << c.bits) - 1;
        const int zero_point = c.is_extreme ? (random_bits() % 2 ? 0 : highest) : random_in(0, highest);
        rest[2 * count + i] = static_cast<uint8_t>(zero_point);
      }
      const float unit = ldexpf(1.0f, random_in(-20, 4));
      memcpy(rest + 3 * count, &unit, sizeof unit);
    }
    x.fill(3.0f);
    if (c.is_extreme) {
      for (int64_t i = 0; i < x.size; ++i) x[i] = 2.5f;
    }
    if (c.num_rows > 2) {
      const int64_t length = x.size / c.num_rows;
      x[length] = NAN;  // in row 1; row 2 is zero
      memset(x.data + 2 * length, 0, static_cast<size_t>(length) * sizeof(float));
    }
    norm.fill(2.0f);
    bias.fill(1.0f);
    residual.fill(1.0f);
  }

  Source source() const {
    return {x.data, c.has_norm ? norm.data : nullptr, 1e-6f, c.gated, c.num_columns};
  }
};

// The rounded rows of a problem and its result, by one instruction set.
struct Result {
  Array<int8_t> codes;
  Array<float> scales, sums, y;

  Result(const Problem& p, const Kernels& isa)
      : codes(p.c.num_rows * p.weight.padded_columns()), scales(p.c.num_rows * p.weight.num_blocks()),
        sums(p.c.num_rows * p.weight.num_blocks()), y(p.c.num_rows * p.c.num_outputs) {
    Array<float> scratch(p.weight.padded_columns());
    const Output output = {y.data, p.c.has_bias ? p.bias.data : nullptr, p.c.has_residual ? p.residual.data : nullptr};
    for (int64_t first = 0; first < p.c.num_rows; first += kPanelRows) {
      const int64_t rows = p.c.num_rows - first < kPanelRows ? p.c.num_rows - first : kPanelRows;
      const Panel panel = {codes.data + first * p.weight.padded_columns(), scales.data + first * p.weight.num_blocks(),
                           sums.data + first * p.weight.num_blocks(), rows};
      for (int64_t i = 0; i < rows; i += 4) {
        isa.quantize(p.source(), first + i, p.weight, panel, i, rows - i < 4 ? rows - i : 4, scratch.data);
      }
      // In two parts, as two threads would.
      const int64_t num_tiles = p.weight.num_tiles(), middle = num_tiles / 3;
      isa.multiply(p.weight, panel, 0, middle, output, first);
      isa.multiply(p.weight, panel, middle, num_tiles, output, first);
    }
  }
};

// Codes of the layout, read one by one; products of the rounded rows in float64.
static void check_plain(const Problem& p, Result& result) {
  const Weight& w = p.weight;
  for (int64_t m = 0; m < p.c.num_rows; m += 5) {
    const int64_t panel_row = m % kPanelRows, first = m - panel_row;
    const int64_t rows = p.c.num_rows - first < kPanelRows ? p.c.num_rows - first : kPanelRows;
    for (int64_t n = 0; n < p.c.num_outputs; n += 7) {
      const Tile tile(w, n / kTileRows);
      const int64_t lane = n % kTileRows;
      double total = 0, size = 0;
      for (int64_t j = 0; j < w.num_blocks(); ++j) {
        const int64_t place = first * w.num_blocks() + j * rows + panel_row;
        const int8_t* row = result.codes.data + first * w.padded_columns() + (j * rows + panel_row) * w.block;
        const uint8_t* codes = tile.codes + j * w.block_bytes();
        long sum = 0;
        for (int k = 0; k < w.block; ++k) {
          const int half = w.bits == 4 ? w.block / 2 : w.block;
          const int byte = codes[k % half / 4 * 64 + lane * 4 + k % 4];
          const int code = w.bits == 8 ? byte : k < half ? byte % 16 : byte / 16;
          sum += static_cast<long>(row[k]) * (code - tile.zero_points[j * kTileRows + lane]);
        }
        const double scale = half_to_double(tile.scales[j * kTileRows + lane]);
        const double part = static_cast<double>(sum) * scale * static_cast<double>(result.scales[place]);
        total += part;
        size += fabs(part);
      }
      total *= static_cast<double>(tile.unit);
      size *= static_cast<double>(tile.unit);
      if (p.c.has_bias) total += static_cast<double>(p.bias.data[n]);
      if (p.c.has_residual) total += static_cast<double>(p.residual.data[m * p.c.num_outputs + n]);
      const double y = static_cast<double>(result.y[m * p.c.num_outputs + n]);
      if (isnan(total) != isnan(y) || fabs(y - total) > 1e-5 * (size + 2)) {
        if (++failures <= 20) printf("portable: y(%ld, %ld) is %.9g, not %.9g\n", long(m), long(n), y, total);
      }
    }
  }
}

static void check_product(const Case& c) {
  Problem p(c);
  Result right(p, kPortable);
  check_plain(p, right);
  mix(right.y.data, right.y.size);
  for (const Kernels* isa : kChecked) {
    char what[160];
    snprintf(what, sizeof what, "%d bits, block %d, M %ld, K %ld, N %ld%s%s", c.bits, c.block, long(c.num_rows),
             long(c.num_columns), long(c.num_outputs), c.gated ? ", gated" : "", c.has_norm ? ", norm" : "");
    Result result(p, *isa);
    compare_bytes(right.codes.data, result.codes.data, right.codes.size, isa->name, what);
    compare(right.scales.data, result.scales.data, right.scales.size, isa->name, what);
    compare(right.sums.data, result.sums.data, right.sums.size, isa->name, what);
    compare(right.y.data, result.y.data, right.y.size, isa->name, what);
    for (int64_t row = 0; row < c.num_outputs; row += 3) {
      Array<float> expected(c.num_columns), found(c.num_columns);
      kPortable.look_up(p.weight, row, expected.data);
      isa->look_up(p.weight, row, found.data);
      compare(expected.data, found.data, c.num_columns, isa->name, "look_up");
    }
  }
}

static void check_products() {
  // Every number of rows up to two panels' ends, on small weights.
  for (int bits = 4; bits <= 8; bits += 4) {
    for (int64_t rows = 1; rows <= 40; ++rows) {
      const int block = 32 << random_in(0, 3);
      check_product({rows, block * random_in(1, 3), random_in(1, 70), bits, block, false, false, false, false, false});
    }
    for (int64_t rows : {47, 48, 64, 65, 95, 96, 97, 101}) {
      const int block = 32 << random_in(0, 3);
      check_product({rows, block * 2, random_in(17, 60), bits, block, false, false, true, true, false});
    }
    for (int block = 32; block <= 256; block *= 2) {
      for (int64_t rows : {1, 7, 20}) {
        // Columns that do not fill the last block; all at the ends of their ranges.
        check_product({rows, block + 5, 40, bits, block, true, false, true, false, false});
        check_product({rows, 2 * block - 1, 33, bits, block, false, true, false, true, false});
        check_product({rows, 2 * block, 48, bits, block, false, false, false, false, true});
      }
    }
  }
}

// Attention: the same bits as plain C++, in the result and in what the cache holds.
static void check_attention(int64_t batch, int64_t tokens, int64_t group, int64_t head_dim, CacheType type) {
  const int64_t kv_heads = 2, heads = kv_heads * group, capacity = tokens + 300;
  Array<float> qkv(batch * tokens * (heads + 2 * kv_heads) * head_dim), q_norm(head_dim), k_norm(head_dim);
  Array<float> cosine(batch * tokens * head_dim / 2), sine(cosine.size);
  Array<float> key_scales(kv_heads * head_dim), value_scales(key_scales.size);
  Array<int64_t> lengths(batch);
  qkv.fill(2.0f);
  q_norm.fill(1.5f);
  k_norm.fill(1.5f);
  cosine.fill(1.0f);
  sine.fill(1.0f);
  for (int64_t i = 0; i < key_scales.size; ++i) key_scales[i] = 0.02f + fabsf(random_float(0.1f));
  for (int64_t i = 0; i < key_scales.size; ++i) value_scales[i] = 0.02f + fabsf(random_float(0.1f));
  for (int64_t b = 0; b < batch; ++b) lengths[b] = b == 0 ? 0 : random_in(1, 300);
  const int64_t rows = batch * kv_heads * capacity;
  const int64_t widths[] = {4 * head_dim, 2 * head_dim, head_dim, head_dim / 2};
  const int64_t bytes = rows * widths[static_cast<int>(type)];
  Array<uint8_t> past_key(bytes), past_value(bytes);
  for (Array<uint8_t>* past : {&past_key, &past_value}) {
    for (int64_t i = 0; i < bytes; ++i) (*past)[i] = static_cast<uint8_t>(random_bits() >> 9);
    // Numbers of a moderate size.
    for (int64_t i = 0; type == CacheType::kFloat32 && i < bytes / 4; ++i) {
      const float value = random_float(2.0f);
      memcpy(past->data + 4 * i, &value, sizeof value);
    }
    for (int64_t i = 1; type == CacheType::kFloat16 && i < bytes; i += 2) {
      (*past)[i] = static_cast<uint8_t>((*past)[i] & 0xbf);
    }
  }
  Array<float> right(batch * tokens * heads * head_dim);
  Array<uint8_t> right_key(bytes), right_value(bytes);
  const auto run = [&](const Kernels& isa, Array<float>& out, Array<uint8_t>& key, Array<uint8_t>& value) {
    const bool has_scales = type == CacheType::kInt8 || type == CacheType::kInt4;
    const Attention a = {batch, tokens, heads, kv_heads, head_dim, capacity, 0.3f, 1e-6f, type, qkv.data, q_norm.data,
                         k_norm.data, cosine.data, sine.data, lengths.data, past_key.data, past_value.data, key.data,
                         value.data, has_scales ? key_scales.data : nullptr, has_scales ? value_scales.data : nullptr,
                         out.data};
    Array<uint8_t> scratch(static_cast<int64_t>(attention_scratch_bytes(a)));
    for (int phase = 0; phase < kAttentionPhases; ++phase) {
      for (int64_t task = 0; task < attention_num_tasks(a, phase); ++task) isa.attend(a, phase, task, scratch.data);
    }
  };
  run(kPortable, right, right_key, right_value);
  mix(right.data, right.size);
  for (const Kernels* isa : kChecked) {
    char what[120];
    snprintf(what, sizeof what, "attention, cache %d, B %ld, S %ld, G %ld, H %ld", static_cast<int>(type), long(batch),
             long(tokens), long(group), long(head_dim));
    Array<float> out(right.size);
    Array<uint8_t> key(bytes), value(bytes);
    run(*isa, out, key, value);
    compare(right.data, out.data, out.size, isa->name, what);
    compare_bytes(right_key.data, key.data, bytes, isa->name, what);
    compare_bytes(right_value.data, value.data, bytes, isa->name, what);
  }
}

int main() {
  check_products();
  for (CacheType type : {CacheType::kFloat32, CacheType::kFloat16, CacheType::kInt8, CacheType::kInt4}) {
    check_attention(3, 1, 2, 64, type);
    check_attention(1, 1, 4, 16, type);
    check_attention(2, 37, 2, 80, type);
  }
  printf("%s after %ld comparisons, hash %016llx\n", failures == 0 ? "passed" : "failed", comparisons,
         static_cast<unsigned long long>(hash));
  return failures == 0 && comparisons > 0 ? 0 : 1;
}
