// From products as whole numbers to rows of y; included by the file of each instruction set inside its namespace.

// A name of that namespace would hide the one of kernels.h without a word.
static_assert(kTileRows == qwen3vl::kTileRows);

// total + scale_x * (products - sum_x * zero_point) * scale
static inline Lanes add_block(Lanes total, Lanes products, float sum_x, float scale_x, Lanes zero_points, Lanes scales) {
  const Lanes whole = fma(broadcast(-sum_x), zero_points, products);
  return fma(mul(whole, broadcast(scale_x)), scales, total);
}

static inline Lanes scales_of(const Tile& tile, int64_t block) { return load_float16(tile.scales + block * kTileRows); }

// Scale by the tile's unit, add bias and residual, and write the columns of y that the tile has.
static void write_tile(const Weight& weight, const Tile& tile, int64_t index, const float* totals, int64_t num_rows,
                       const Output& output, int64_t first_row) {
  const int64_t column = index * kTileRows;
  const int width = static_cast<int>(weight.num_rows - column < kTileRows ? weight.num_rows - column : kTileRows);
  const Lanes unit = broadcast(tile.unit);
  const Lanes bias = output.bias != nullptr ? load_n(output.bias + column, width) : zero();
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t offset = (first_row + i) * weight.num_rows + column;
    Lanes value = fma(load(totals + i * kTileRows), unit, bias);
    if (output.residual != nullptr) value = add(value, load_n(output.residual + offset, width));
    store_n(output.y + offset, value, width);
  }
}
