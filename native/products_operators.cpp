// MatMulInt4, MatMulInt8, LookUpInt4, LookUpInt8: products with, and rows of, a weight in few bits.
#include "operators.h"
#include "tensors.h"

namespace qwen3vl {
namespace {

using ort::elements;
using ort::Tensor;
using ort::Workspace;

constexpr int64_t kMaxSize = INT32_MAX;

struct Attributes {
  int64_t num_columns, num_rows, block, gated;
  float epsilon;
};

OrtStatus* read_attributes(const OrtKernelInfo* info, Attributes* attributes) {
  QWEN3VL_TRY(ort::api.attribute(info, "K", &attributes->num_columns));
  QWEN3VL_TRY(ort::api.attribute(info, "N", &attributes->num_rows));
  QWEN3VL_TRY(ort::api.attribute(info, "block_size", &attributes->block));
  const int64_t block = attributes->block;
  if (block != 32 && block != 64 && block != 128 && block != 256) {
    return ort::error("block_size is %lld, expected 32, 64, 128 or 256", static_cast<long long>(block));
  }
  if (attributes->num_columns < 1 || attributes->num_columns > kMaxSize || attributes->num_rows < 1 ||
      attributes->num_rows > kMaxSize) {
    return ort::error("K = %lld, N = %lld: expected 1 to %lld", static_cast<long long>(attributes->num_columns),
                      static_cast<long long>(attributes->num_rows), static_cast<long long>(kMaxSize));
  }
  return nullptr;
}

// An attribute that may be left out.
template <typename T>
void read_optional(const OrtKernelInfo* info, const char* name, T* value) {
  if (OrtStatus* status = ort::api.attribute(info, name, value); status != nullptr) ort::api.release_status(status);
}

OrtStatus* read_weight(const Tensor& tensor, const Attributes& attributes, int bits, Weight* weight) {
  *weight = {elements<uint8_t>(tensor), attributes.num_rows, attributes.num_columns, bits,
             static_cast<int32_t>(attributes.block)};
  if (tensor.rank != 2 || tensor.shape[0] != weight->num_tiles() || tensor.shape[1] != weight->tile_bytes()) {
    return ort::error("a packed weight of N = %lld, K = %lld, block_size = %d, %d bits is [%lld, %lld], not [%lld, %lld]",
                      static_cast<long long>(weight->num_rows), static_cast<long long>(weight->num_columns),
                      weight->block, bits, static_cast<long long>(weight->num_tiles()),
                      static_cast<long long>(weight->tile_bytes()), static_cast<long long>(tensor.shape[0]),
                      static_cast<long long>(tensor.shape[1]));
  }
  return nullptr;
}

// What a product reads and writes.
struct Product {
  Weight weight;
  Source source;
  Output output;
  int64_t num_rows;  // M
};

// Rows of x that one task rounds: a few microseconds of work.
constexpr int64_t kQuantizeRows = 4;

// How many tiles one task multiplies by: enough tasks for the threads to share, each large enough to be worth a start and
// the weights that are fetched ahead beyond its end.
int64_t tiles_of_task(const Weight& weight, int64_t num_rows, int64_t num_panels) {
  constexpr int64_t kTasks = 64, kBytes = 128 << 10, kRows = 8;
  const int64_t groups = num_panels >= kTasks ? 1 : divide_up(kTasks, num_panels);
  const int64_t least = divide_up(kBytes / (num_rows < kRows ? num_rows : kRows), weight.tile_bytes());
  const int64_t even = divide_up(weight.num_tiles(), groups);
  return even > least ? even : least;
}

OrtStatus* run(OrtKernelContext* context, const Product& product) {
  const Kernels& isa = kernels();
  const Weight& weight = product.weight;
  const int64_t num_rows = product.num_rows, num_blocks = weight.num_blocks(), padded = weight.padded_columns();
  const int64_t num_panels = divide_up(num_rows, kPanelRows), num_groups = divide_up(num_rows, kQuantizeRows);
  // Rows are rounded by groups that lie in one panel.
  static_assert(kPanelRows % kQuantizeRows == 0);
  const int64_t scratch_floats = align_up(padded, 16);
  Workspace workspace(Workspace::bytes<int8_t>(num_rows * padded) +
                      2 * Workspace::bytes<float>(num_rows * num_blocks) +
                      Workspace::bytes<float>(num_groups * scratch_floats));
  if (!workspace.is_there()) return ort::api.status(ort::kFail, "no memory for the rounded activations of a product");
  int8_t* codes = workspace.take<int8_t>(num_rows * padded);
  float* scales = workspace.take<float>(num_rows * num_blocks);
  float* sums = workspace.take<float>(num_rows * num_blocks);
  float* scratch = workspace.take<float>(num_groups * scratch_floats);

  const auto panel_at = [&](int64_t index) {
    const int64_t first = index * kPanelRows;
    const int64_t rows = num_rows - first < kPanelRows ? num_rows - first : kPanelRows;
    return Panel{codes + first * padded, scales + first * num_blocks, sums + first * num_blocks, rows};
  };
  QWEN3VL_TRY(ort::parallel_for(context, num_groups, [&](int64_t group) {
    const int64_t first = group * kQuantizeRows;
    const int64_t rows = num_rows - first < kQuantizeRows ? num_rows - first : kQuantizeRows;
    isa.quantize(product.source, first, weight, panel_at(first / kPanelRows), first % kPanelRows, rows,
                 scratch + group * scratch_floats);
  }));
  const int64_t num_tiles = weight.num_tiles(), step = tiles_of_task(weight, num_rows, num_panels);
  const int64_t tasks_of_panel = divide_up(num_tiles, step);
  return ort::parallel_for(context, num_panels * tasks_of_panel, [&](int64_t task) {
    const int64_t panel = task / tasks_of_panel, first = task % tasks_of_panel * step;
    const int64_t last = first + step < num_tiles ? first + step : num_tiles;
    isa.multiply(weight, panel_at(panel), first, last, product.output, panel * kPanelRows);
  });
}

OrtStatus* check_vector(const Tensor& tensor, const char* name, int64_t length) {
  if (tensor.is_there() && tensor.num_elements() != length) {
    return ort::error("%s has %lld elements, expected %lld", name, static_cast<long long>(tensor.num_elements()),
                      static_cast<long long>(length));
  }
  return nullptr;
}

template <int BITS>
struct MatMul {
  static constexpr const char* kName = BITS == 4 ? "MatMulInt4" : "MatMulInt8";
  enum Input { kX, kWeight, kBias, kNorm, kResidual, kNumInputs };
  static constexpr ort::ElementType kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t kNumRequired = 2;
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  Attributes attributes;

  OrtStatus* create(const OrtKernelInfo* info) {
    attributes.epsilon = 1e-6f;
    attributes.gated = 0;
    read_optional(info, "epsilon", &attributes.epsilon);
    read_optional(info, "gated", &attributes.gated);
    return read_attributes(info, &attributes);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor inputs[kNumInputs];
    for (size_t i = 0; i < kNumInputs; ++i) QWEN3VL_TRY(ort::read_input(context, i, &inputs[i]));
    const Tensor& x = inputs[kX];
    const int64_t num_columns = attributes.num_columns, row_length = attributes.gated ? 2 * num_columns : num_columns;
    if (x.rank < 1 || x.shape[x.rank - 1] != row_length) {
      return ort::error("rows of x have %lld elements, expected %lld",
                        static_cast<long long>(x.rank < 1 ? 0 : x.shape[x.rank - 1]),
                        static_cast<long long>(row_length));
    }
    if (attributes.gated && inputs[kNorm].is_there()) return ort::error("gated and norm exclude each other");
    Product product;
    product.num_rows = x.num_elements() / row_length;
    QWEN3VL_TRY(read_weight(inputs[kWeight], attributes, BITS, &product.weight));
    QWEN3VL_TRY(check_vector(inputs[kBias], "bias", attributes.num_rows));
    QWEN3VL_TRY(check_vector(inputs[kNorm], "norm", num_columns));
    QWEN3VL_TRY(check_vector(inputs[kResidual], "residual", product.num_rows * attributes.num_rows));
    const Tensor& residual = inputs[kResidual];
    if (residual.is_there() && (residual.rank < 1 || residual.shape[residual.rank - 1] != attributes.num_rows)) {
      return ort::error("rows of the residual have %lld elements, expected %lld",
                        static_cast<long long>(residual.rank < 1 ? 1 : residual.shape[residual.rank - 1]),
                        static_cast<long long>(attributes.num_rows));
    }
    int64_t shape[Tensor::kMaxRank];
    for (size_t i = 0; i < x.rank; ++i) shape[i] = x.shape[i];
    shape[x.rank - 1] = attributes.num_rows;
    Tensor y;
    QWEN3VL_TRY(ort::make_output(context, 0, shape, x.rank, &y));
    if (product.num_rows == 0) return nullptr;
    product.source = {elements<float>(x), elements<float>(inputs[kNorm]), attributes.epsilon, attributes.gated != 0, num_columns};
    product.output = {elements<float>(y), elements<float>(inputs[kBias]), elements<float>(residual)};
    return run(context, product);
  }
};

template <int BITS>
struct LookUp {
  static constexpr const char* kName = BITS == 4 ? "LookUpInt4" : "LookUpInt8";
  static constexpr ort::ElementType kInputs[] = {ort::kInt64, ort::kUint8};
  static constexpr size_t kNumInputs = 2, kNumRequired = 2;
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  Attributes attributes;

  OrtStatus* create(const OrtKernelInfo* info) { return read_attributes(info, &attributes); }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor indices, table, y;
    QWEN3VL_TRY(ort::read_input(context, 0, &indices));
    QWEN3VL_TRY(ort::read_input(context, 1, &table));
    Weight weight;
    QWEN3VL_TRY(read_weight(table, attributes, BITS, &weight));
    const int64_t num_indices = indices.num_elements();
    const int64_t* rows = elements<int64_t>(indices);
    for (int64_t i = 0; i < num_indices; ++i) {
      if (rows[i] < 0 || rows[i] >= weight.num_rows) {
        return ort::error("index %lld, expected 0 to %lld", static_cast<long long>(rows[i]),
                          static_cast<long long>(weight.num_rows - 1));
      }
    }
    if (indices.rank + 1 > Tensor::kMaxRank) return ort::error("indices have %zu axes", indices.rank);
    int64_t shape[Tensor::kMaxRank];
    for (size_t i = 0; i < indices.rank; ++i) shape[i] = indices.shape[i];
    shape[indices.rank] = weight.num_columns;
    QWEN3VL_TRY(ort::make_output(context, 0, shape, indices.rank + 1, &y));
    constexpr int64_t kRowsOfTask = 8;
    const Kernels& isa = kernels();
    return ort::parallel_for(context, divide_up(num_indices, kRowsOfTask), [&](int64_t task) {
      for (int64_t i = task * kRowsOfTask; i < (task + 1) * kRowsOfTask && i < num_indices; ++i) {
        isa.look_up(weight, rows[i], elements<float>(y) + i * weight.num_columns);
      }
    });
  }
};

}  // namespace

OrtStatus* add_products(OrtCustomOpDomain* domain) {
  QWEN3VL_TRY(ort::add_operator<MatMul<4>>(domain));
  QWEN3VL_TRY(ort::add_operator<MatMul<8>>(domain));
  QWEN3VL_TRY(ort::add_operator<LookUp<4>>(domain));
  return ort::add_operator<LookUp<8>>(domain);
}

}  // namespace qwen3vl
