// What operators see of ONNX Runtime: tensors, errors, loops on the session's threads.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels.h"
#include "ort_api.h"

namespace qwen3vl::ort {

extern Api api;

// Leave the function with an error that is not null.
#define QWEN3VL_TRY(expression)                                      \
  do {                                                               \
    if (OrtStatus* status_ = (expression); status_ != nullptr) return status_; \
  } while (0)

__attribute__((format(printf, 1, 2))) inline OrtStatus* error(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return api.status(kInvalidArgument, message);
}

// A tensor of the graph, whose memory ONNX Runtime owns.
struct Tensor {
  static constexpr size_t kMaxRank = 8;
  void* data = nullptr;  // null: an optional input that is not there, or a tensor without elements
  int64_t shape[kMaxRank] = {};
  size_t rank = 0;

  // A tensor without elements may have no memory, and is there all the same.
  bool is_there() const { return data != nullptr || rank > 0; }
  int64_t num_elements() const {
    int64_t product = 1;
    for (size_t i = 0; i < rank; ++i) product *= shape[i];
    return product;
  }
};

template <typename T>
T* elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.data);
}

inline OrtStatus* read_input(const OrtKernelContext* context, size_t index, Tensor* tensor) {
  const OrtValue* value = nullptr;
  QWEN3VL_TRY(api.input(context, index, &value));
  if (value == nullptr) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  QWEN3VL_TRY(api.shape_info(value, &info));
  OrtStatus* status = api.rank(info, &tensor->rank);
  if (status == nullptr && tensor->rank > Tensor::kMaxRank) status = error("input %zu has %zu axes", index, tensor->rank);
  if (status == nullptr) status = api.shape(info, tensor->shape, tensor->rank);
  api.release_shape_info(info);
  if (status != nullptr) return status;
  return api.data(value, &tensor->data);
}

inline OrtStatus* make_output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank,
                              Tensor* tensor) {
  OrtValue* value = nullptr;
  QWEN3VL_TRY(api.output(context, index, shape, rank, &value));
  tensor->rank = rank;
  for (size_t i = 0; i < rank; ++i) tensor->shape[i] = shape[i];
  return api.data(value, &tensor->data);
}

// Memory of one call, aligned to cache lines; free it through the destructor.
class Workspace {
 public:
  explicit Workspace(size_t num_bytes)
      : memory_(std::aligned_alloc(kAlignment, static_cast<size_t>(align_up(static_cast<int64_t>(num_bytes) + 1, kAlignment)))),
        next_(static_cast<uint8_t*>(memory_)) {}
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  bool is_there() const { return memory_ != nullptr; }
  // Bytes that `take` uses for so many elements.
  template <typename T>
  static size_t bytes(int64_t count) {
    return static_cast<size_t>(align_up(count * int64_t{sizeof(T)}, kAlignment));
  }
  template <typename T>
  T* take(int64_t count) {
    T* start = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return start;
  }

 private:
  void* memory_;
  uint8_t* next_;
};

// Call function(0) ... function(num_tasks - 1) on the session's threads; a single task on this one.
template <typename Function>
OrtStatus* parallel_for(const OrtKernelContext* context, int64_t num_tasks, Function function) {
  if (num_tasks <= 1) {
    if (num_tasks == 1) function(int64_t{0});
    return nullptr;
  }
  return api.parallel_for(
      context, [](void* user, size_t index) { (*static_cast<Function*>(user))(static_cast<int64_t>(index)); },
      static_cast<size_t>(num_tasks), &function);
}

}  // namespace qwen3vl::ort
