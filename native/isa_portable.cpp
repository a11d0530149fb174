// Plain C++, for processors that none of the other files is for.
#define QWEN3VL_ISA portable
#define QWEN3VL_PORTABLE_LANES

#include "kernels.h"
#include "lanes.h"

namespace portable {
using namespace qwen3vl;

#include "activations.h"
#include "look_up.h"
#include "attention.h"

template <int BITS>
constexpr int kDirectRows = 1;
template <int BITS>
constexpr int kManyRows = 2;
template <int BITS>
constexpr int kFewRows = 1;
template <int BITS>
constexpr int kOffset = 0;

template <int BITS>
static const uint8_t* unpack(const uint8_t* codes, int block, uint8_t* buffer) {
  if (BITS == 8) return codes;
  const int num_bytes = block / 2 * static_cast<int>(kTileRows);
  for (int i = 0; i < num_bytes; ++i) {
    buffer[i] = codes[i] & 15;
    buffer[num_bytes + i] = codes[i] >> 4;
  }
  return buffer;
}

template <int BITS, int R>
static void multiply_unpacked(const uint8_t* unpacked, const int8_t* x, int block, Lanes* products) {
  for (int r = 0; r < R; ++r) {
    int32_t sums[kTileRows] = {};
    for (int k = 0; k < block; k += 4) {
      const uint8_t* codes = unpacked + k * kTileRows;
      const int8_t* row = x + r * block + k;
      for (int n = 0; n < kTileRows; ++n) {
        sums[n] += codes[4 * n] * row[0] + codes[4 * n + 1] * row[1] + codes[4 * n + 2] * row[2] + codes[4 * n + 3] * row[3];
      }
    }
    for (int n = 0; n < kTileRows; ++n) products[r].v[n] = static_cast<float>(sums[n]);
  }
}

template <int BITS, int R>
static void multiply_codes(const uint8_t* codes, const int8_t* x, int block, Lanes* products) {
  alignas(64) uint8_t buffer[256 * kTileRows];
  multiply_unpacked<BITS, R>(unpack<BITS>(codes, block, buffer), x, block, products);
}

#include "products.h"

}  // namespace portable

namespace qwen3vl {
const Kernels kPortable = {"portable", portable::quantize, portable::multiply, portable::look_up, portable::attend};
}
