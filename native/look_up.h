// A row of a weight in few bits, as floats; included by the file of each instruction set.

// At any address, as all of a weight's parts.
static inline float half_to_float(const uint16_t* half) {
  alignas(64) uint16_t halves[16] = {};
  __builtin_memcpy(halves, half, sizeof *halves);
  alignas(64) float floats[16];
  store(floats, load_float16(halves));
  return floats[0];
}

static void look_up(const Weight& weight, int64_t row, float* y) {
  const Tile tile(weight, row / kTileRows);
  const int64_t n = row % kTileRows;
  const int block = weight.block, half = block / 2;
  for (int64_t j = 0; j < weight.num_blocks(); ++j) {
    const uint8_t* codes = tile.codes + j * weight.block_bytes();
    const float scale = half_to_float(tile.scales + j * kTileRows + n) * tile.unit;
    const int zero_point = tile.zero_points[j * kTileRows + n];
    const int64_t first = j * block, end = first + block < weight.num_columns ? first + block : weight.num_columns;
    for (int64_t column = first; column < end; ++column) {
      const int k = static_cast<int>(column - first);
      int code;
      if (weight.bits == 8) {
        code = codes[(k / 4 * kTileRows + n) * 4 + k % 4];
      } else {
        const int place = k % half;
        const uint8_t both = codes[(place / 4 * kTileRows + n) * 4 + place % 4];
        code = k < half ? both & 15 : both >> 4;
      }
      y[column] = scale * static_cast<float>(code - zero_point);
    }
  }
}
