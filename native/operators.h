// Registration of operators: what ONNX Runtime asks of one, made of a struct that says what it takes and computes.
#pragma once

#include <cstdlib>
#include <cstring>

#include "ort_api.h"
#include "tensors.h"

namespace qwen3vl {

OrtStatus* add_products(OrtCustomOpDomain* domain);
OrtStatus* add_attention(OrtCustomOpDomain* domain);

namespace ort {

// The table of functions of an operator, a struct with
//   kName, kInputs and kOutputs (element types), kNumInputs, kNumRequired (inputs before the optional ones),
//   OrtStatus* create(const OrtKernelInfo*), and OrtStatus* compute(OrtKernelContext*) const.
template <typename Operator>
struct Table {
  static OrtStatus* create(const OrtCustomOp*, const void*, const OrtKernelInfo* info, void** kernel) {
    auto* made = static_cast<Operator*>(std::calloc(1, sizeof(Operator)));
    if (made == nullptr) return api.status(kFail, "no memory for an operator");
    if (OrtStatus* status = made->create(info); status != nullptr) {
      std::free(made);
      return status;
    }
    *kernel = made;
    return nullptr;
  }
  static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    return static_cast<const Operator*>(kernel)->compute(context);
  }
  static const char* name(const OrtCustomOp*) { return Operator::kName; }
  static const char* provider(const OrtCustomOp*) { return nullptr; }  // the CPU's
  static int input_type(const OrtCustomOp*, size_t index) { return Operator::kInputs[index]; }
  static size_t num_inputs(const OrtCustomOp*) { return Operator::kNumInputs; }
  static int output_type(const OrtCustomOp*, size_t index) { return Operator::kOutputs[index]; }
  static size_t num_outputs(const OrtCustomOp*) { return sizeof Operator::kOutputs / sizeof Operator::kOutputs[0]; }
  static int input_characteristic(const OrtCustomOp*, size_t index) {
    return index < Operator::kNumRequired ? kRequired : kOptional;
  }
  static int output_characteristic(const OrtCustomOp*, size_t) { return kRequired; }
  static int memory_type(const OrtCustomOp*, size_t) { return 0; }
  static int one(const OrtCustomOp*) { return 1; }
  static int last_version(const OrtCustomOp*) { return 1; }

  static constexpr OrtCustomOp kTable = {
      kApiVersion, nullptr,     name,        provider,   input_type, num_inputs,           output_type,
      num_outputs, nullptr,     std::free,   input_characteristic,   output_characteristic, memory_type,
      one,         one,         one,         one,        create,     compute,              nullptr,
      one,         last_version, {}};
};

template <typename Operator>
OrtStatus* add_operator(OrtCustomOpDomain* domain) {
  return api.add_operator(domain, &Table<Operator>::kTable);
}

}  // namespace ort
}  // namespace qwen3vl
