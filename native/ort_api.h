// The part of ONNX Runtime's C interface that custom operators need, declared by hand: its headers are not in its wheels.
//
// The interface is a table of functions that only grows, so a function keeps its place in all later releases
// (onnxruntime_c_api.h, struct OrtApi). GetApi(17) gives the table of release 1.17 or null.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Fields up to version 17; later releases read no more of an operator that says so.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const void* api, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  void* later[4];
};
}  // extern "C"

namespace qwen3vl::ort {

constexpr uint32_t kApiVersion = 17;
enum ElementType { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

// Typed access to the functions of the table.
class Api {
 public:
  void set(const void* const* table) { table_ = table; }

  OrtStatus* status(ErrorCode code, const char* message) const {
    return call<OrtStatus* (*)(int, const char*)>(0)(code, message);
  }
  void release_status(OrtStatus* status) const { call<void (*)(OrtStatus*)>(93)(status); }

  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) const {
    return call<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(name, domain);
  }
  OrtStatus* add_operator(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return call<OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return call<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }

  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return call<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* value) const {
    return call<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, value);
  }

  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** value) const {
    return call<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, value);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank,
                    OrtValue** value) const {
    return call<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index,
                                                                                                  shape, rank, value);
  }
  OrtStatus* data(const OrtValue* value, void** data) const {
    return call<OrtStatus* (*)(const OrtValue*, void**)>(51)(value, data);
  }
  OrtStatus* shape_info(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) const {
    return call<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, info);
  }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* rank) const {
    return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, rank);
  }
  OrtStatus* shape(const OrtTensorTypeAndShapeInfo* info, int64_t* shape, size_t rank) const {
    return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, shape, rank);
  }
  void release_shape_info(OrtTensorTypeAndShapeInfo* info) const {
    call<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info);
  }

  // Run task(user, 0) ... task(user, num_tasks - 1) on the session's threads, this one among them.
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*task)(void* user, size_t index), size_t num_tasks,
                          void* user) const {
    using Task = void (*)(void*, size_t);
    return call<OrtStatus* (*)(const OrtKernelContext*, Task, size_t, size_t, void*)>(274)(context, task, num_tasks, 0,
                                                                                          user);
  }

 private:
  template <typename Function>
  Function call(size_t place) const {
    return reinterpret_cast<Function>(const_cast<void*>(table_[place]));
  }

  const void* const* table_ = nullptr;
};

}  // namespace qwen3vl::ort
