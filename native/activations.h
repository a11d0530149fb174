// Rows of x, normalised or gated if asked, rounded to 8 bits; included by the file of each instruction set.

// RMSNorm: x / sqrt(mean(x^2) + epsilon) * norm. [Zhang and Sennrich, arXiv:1910.07467]
static inline void normalise(const float* x, const float* norm, float epsilon, int64_t num_columns, float* y) {
  Lanes squares = zero();
  int64_t k = 0;
  for (; k + 16 <= num_columns; k += 16) {
    const Lanes value = load(x + k);
    squares = fma(value, value, squares);
  }
  const int rest = static_cast<int>(num_columns - k);
  if (rest > 0) {
    const Lanes value = load_n(x + k, rest);
    squares = fma(value, value, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(num_columns);
  const Lanes factor = broadcast(1.0f / __builtin_sqrtf(mean + epsilon));
  for (k = 0; k + 16 <= num_columns; k += 16) store(y + k, mul(mul(load(x + k), factor), load(norm + k)));
  if (rest > 0) store(y + k, mul(mul(load_n(x + k, rest), factor), load_n(norm + k, rest)));
}

// silu(gate) * up = gate / (1 + exp(-gate)) * up.
static inline Lanes swiglu(Lanes gate, Lanes up) {
  const Lanes one = broadcast(1.0f);
  return mul(div(gate, add(one, exp(sub(zero(), gate)))), up);
}

static inline void gate_row(const float* x, int64_t num_columns, float* y) {
  const float* up = x + num_columns;
  int64_t k = 0;
  for (; k + 16 <= num_columns; k += 16) store(y + k, swiglu(load(x + k), load(up + k)));
  const int rest = static_cast<int>(num_columns - k);
  if (rest > 0) store(y + k, swiglu(load_n(x + k, rest), load_n(up + k, rest)));
}

// One block of a row: codes, scale and sum; `x` has `block` elements.
static inline void quantize_block(const float* x, int block, int8_t* codes, float* scale, float* sum) {
  Lanes largest = zero();
  for (int k = 0; k < block; k += 16) largest = max(largest, abs(load(x + k)));
  const float range = reduce_max(largest);
  // NaN and infinities: the scale is NaN, and so is every product of this row.
  if (!(range <= 3.4028234e38f)) {
    __builtin_memset(codes, 0, static_cast<size_t>(block));
    *scale = __builtin_nanf("");
    *sum = 0.0f;
    return;
  }
  *scale = range / 127.0f;
  // Of a range below 127 / FLT_MAX the reciprocal is infinite: such a block is 0.
  const float inverse = range > 1e-36f ? 127.0f / range : 0.0f;
  const Lanes factor = broadcast(inverse);
  Lanes total = zero();  // whole numbers below 2^24, so that their sum is exact
  for (int k = 0; k < block; k += 16) {
    const Lanes rounded = round_to_even(mul(load(x + k), factor));
    total = add(total, rounded);
    store_int8(codes + k, rounded);
  }
  *sum = reduce_add(total);
}

static void quantize(const Source& source, int64_t first_row, const Weight& weight, const Panel& panel,
                     int64_t panel_row, int64_t num_rows, float* scratch) {
  const int64_t num_columns = source.num_columns, padded = weight.padded_columns();
  const bool copies = source.gated || source.norm != nullptr || padded != num_columns;
  for (int64_t i = 0; i < num_rows; ++i) {
    const float* x = source.row(first_row + i);
    if (source.gated) {
      gate_row(x, num_columns, scratch);
    } else if (source.norm != nullptr) {
      normalise(x, source.norm, source.epsilon, num_columns, scratch);
    } else if (copies) {
      __builtin_memcpy(scratch, x, static_cast<size_t>(num_columns) * sizeof(float));
    }
    if (copies) {
      for (int64_t k = num_columns; k < padded; ++k) scratch[k] = 0.0f;
      x = scratch;
    }
    for (int64_t j = 0; j < weight.num_blocks(); ++j) {
      const int64_t place = j * panel.num_rows + panel_row + i;
      quantize_block(x + j * weight.block, weight.block, panel.codes + place * weight.block, panel.scales + place,
                     panel.sums + place);
    }
  }
}
