// DecodeAttention, and its forms for caches of fewer bits: norm and rotary embedding of q and k, the new rows of the KV
// cache, and causal grouped-query attention.
#include "attention_plan.h"
#include "operators.h"
#include "tensors.h"

namespace qwen3vl {
namespace {

using ort::elements;
using ort::Tensor;
using ort::Workspace;

using Size = long long;  // what printf takes

OrtStatus* check_shape(const Tensor& tensor, const char* name, const int64_t* shape, size_t rank) {
  bool is_right = tensor.rank == rank;
  for (size_t i = 0; is_right && i < rank; ++i) is_right = tensor.shape[i] == shape[i];
  if (is_right) return nullptr;
  static_assert(Tensor::kMaxRank <= 8);
  char expected[8 * 22] = "", got[8 * 22] = "";  // an axis takes 20 characters at most, and two between
  size_t used = 0;
  for (size_t i = 0; i < rank; ++i) {
    used += static_cast<size_t>(std::snprintf(expected + used, sizeof expected - used, i ? ", %lld" : "%lld", Size{shape[i]}));
  }
  used = 0;
  for (size_t i = 0; i < tensor.rank; ++i) {
    used += static_cast<size_t>(std::snprintf(got + used, sizeof got - used, i ? ", %lld" : "%lld", Size{tensor.shape[i]}));
  }
  return ort::error("%s is [%s], expected [%s]", name, got, expected);
}

struct CacheKind {
  const char* name;
  CacheType type;
  ort::ElementType element;
  int64_t channels_of_element;
};

constexpr CacheKind kKinds[] = {
    {"DecodeAttention", CacheType::kFloat32, ort::kFloat, 1},
    {"DecodeAttentionFloat16", CacheType::kFloat16, ort::kFloat16, 1},
    {"DecodeAttentionInt8", CacheType::kInt8, ort::kInt8, 1},
    {"DecodeAttentionInt4", CacheType::kInt4, ort::kUint8, 2},
};

template <CacheType TYPE>
struct DecodeAttention {
  static constexpr CacheKind kKind = kKinds[static_cast<int>(TYPE)];
  static_assert(kKind.type == TYPE);
  static constexpr bool kHasScales = TYPE == CacheType::kInt8 || TYPE == CacheType::kInt4;
  static constexpr const char* kName = kKind.name;
  enum Input { kQkv, kQNorm, kKNorm, kCos, kSin, kPastKey, kPastValue, kPastLengths, kKeyScales, kValueScales };
  static constexpr ort::ElementType kInputs[] = {ort::kFloat,   ort::kFloat,   ort::kFloat, ort::kFloat, ort::kFloat,
                                                 kKind.element, kKind.element, ort::kInt64, ort::kFloat, ort::kFloat};
  static constexpr size_t kNumInputs = kHasScales ? 10 : 8;
  static constexpr size_t kNumRequired = kNumInputs;
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat, kKind.element, kKind.element};

  int64_t num_heads, num_kv_heads;
  float scale, epsilon;

  OrtStatus* create(const OrtKernelInfo* info) {
    QWEN3VL_TRY(ort::api.attribute(info, "num_heads", &num_heads));
    QWEN3VL_TRY(ort::api.attribute(info, "kv_num_heads", &num_kv_heads));
    QWEN3VL_TRY(ort::api.attribute(info, "scale", &scale));
    QWEN3VL_TRY(ort::api.attribute(info, "epsilon", &epsilon));
    if (num_kv_heads < 1 || num_heads < num_kv_heads || num_heads % num_kv_heads != 0 || num_heads > INT32_MAX) {
      return ort::error("num_heads = %lld, kv_num_heads = %lld: expected a multiple of it", Size{num_heads},
                        Size{num_kv_heads});
    }
    return nullptr;
  }

  // Read and compare the shapes of the inputs.
  OrtStatus* read(const OrtKernelContext* context, Tensor* inputs, Attention* a) const {
    for (size_t i = 0; i < kNumInputs; ++i) QWEN3VL_TRY(ort::read_input(context, i, &inputs[i]));
    const Tensor &qkv = inputs[kQkv], &past = inputs[kPastKey];
    if (qkv.rank != 3 || past.rank != 4) return ort::error("qkv has %zu axes, past_key %zu: expected 3 and 4", qkv.rank, past.rank);
    const int64_t head_dim = inputs[kQNorm].num_elements();
    if (head_dim < 16 || head_dim % 16 != 0 || head_dim > kMaxHeadDim) {
      return ort::error("heads of %lld channels, expected a multiple of 16 up to %lld", Size{head_dim}, Size{kMaxHeadDim});
    }
    const int64_t batch = qkv.shape[0], num_tokens = qkv.shape[1], capacity = past.shape[2];
    const int64_t qkv_shape[] = {batch, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim};
    const int64_t table_shape[] = {batch, num_tokens, head_dim / 2};
    const int64_t cache_shape[] = {batch, num_kv_heads, capacity, head_dim / kKind.channels_of_element};
    QWEN3VL_TRY(check_shape(qkv, "qkv", qkv_shape, 3));
    QWEN3VL_TRY(check_shape(inputs[kQNorm], "q_norm", &head_dim, 1));
    QWEN3VL_TRY(check_shape(inputs[kKNorm], "k_norm", &head_dim, 1));
    QWEN3VL_TRY(check_shape(inputs[kCos], "cos", table_shape, 3));
    QWEN3VL_TRY(check_shape(inputs[kSin], "sin", table_shape, 3));
    QWEN3VL_TRY(check_shape(past, "past_key", cache_shape, 4));
    QWEN3VL_TRY(check_shape(inputs[kPastValue], "past_value", cache_shape, 4));
    QWEN3VL_TRY(check_shape(inputs[kPastLengths], "past_lengths", &batch, 1));
    const int64_t* lengths = elements<int64_t>(inputs[kPastLengths]);
    for (int64_t b = 0; b < batch; ++b) {
      if (lengths[b] < 0 || lengths[b] > capacity - num_tokens) {
        return ort::error("past_lengths[%lld] is %lld: with %lld new tokens it exceeds the cache of %lld rows", Size{b},
                          Size{lengths[b]}, Size{num_tokens}, Size{capacity});
      }
    }
    if constexpr (kHasScales) {
      for (size_t i = kKeyScales; i <= kValueScales; ++i) {
        if (inputs[i].num_elements() != num_kv_heads * head_dim) {
          return ort::error("%lld scales of the cache, expected %lld", Size{inputs[i].num_elements()},
                            Size{num_kv_heads * head_dim});
        }
      }
    }
    *a = {batch, num_tokens, num_heads, num_kv_heads, head_dim, capacity, scale, epsilon, TYPE,
          elements<float>(qkv), elements<float>(inputs[kQNorm]), elements<float>(inputs[kKNorm]), elements<float>(inputs[kCos]),
          elements<float>(inputs[kSin]), lengths, past.data, inputs[kPastValue].data, nullptr, nullptr,
          nullptr, nullptr, nullptr};
    if constexpr (kHasScales) {
      a->key_scales = elements<float>(inputs[kKeyScales]);
      a->value_scales = elements<float>(inputs[kValueScales]);
    }
    return nullptr;
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor inputs[10], out, present_key, present_value;
    Attention a;
    QWEN3VL_TRY(read(context, inputs, &a));
    const int64_t out_shape[] = {a.batch, a.num_tokens, num_heads * a.head_dim};
    QWEN3VL_TRY(ort::make_output(context, 0, out_shape, 3, &out));
    QWEN3VL_TRY(ort::make_output(context, 1, inputs[kPastKey].shape, 4, &present_key));
    QWEN3VL_TRY(ort::make_output(context, 2, inputs[kPastKey].shape, 4, &present_value));
    a.out = elements<float>(out);
    a.present_key = present_key.data;
    a.present_value = present_value.data;
    if (a.batch == 0) return nullptr;  // without new tokens, the past may still have to be copied
    Workspace workspace(attention_scratch_bytes(a));
    if (!workspace.is_there()) return ort::api.status(ort::kFail, "no memory for attention");
    void* scratch = workspace.take<uint8_t>(0);
    const Kernels& isa = kernels();
    for (int phase = 0; phase < kAttentionPhases; ++phase) {
      QWEN3VL_TRY(ort::parallel_for(context, attention_num_tasks(a, phase),
                                    [&](int64_t task) { isa.attend(a, phase, task, scratch); }));
    }
    return nullptr;
  }
};

}  // namespace

OrtStatus* add_attention(OrtCustomOpDomain* domain) {
  QWEN3VL_TRY(ort::add_operator<DecodeAttention<CacheType::kFloat32>>(domain));
  QWEN3VL_TRY(ort::add_operator<DecodeAttention<CacheType::kFloat16>>(domain));
  QWEN3VL_TRY(ort::add_operator<DecodeAttention<CacheType::kInt8>>(domain));
  return ort::add_operator<DecodeAttention<CacheType::kInt4>>(domain);
}

}  // namespace qwen3vl
