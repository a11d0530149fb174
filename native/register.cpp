// RegisterCustomOps, the function that ONNX Runtime looks for in a library of custom operators.
#include "operators.h"

namespace qwen3vl::ort {
Api api;
}

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using qwen3vl::ort::api;
  const void* const* table = base->GetApi(qwen3vl::ort::kApiVersion);
  if (table == nullptr) {
    // The first release's table makes the error, the place of that function has not changed.
    api.set(base->GetApi(1));
    char message[200];
    std::snprintf(message, sizeof message,
                  "qwen3vl's kernels need ONNX Runtime's C interface of version %u, which release %.40s does not offer",
                  qwen3vl::ort::kApiVersion, base->GetVersionString());
    return api.status(qwen3vl::ort::kFail, message);
  }
  api.set(table);
  // ONNX Runtime borrows a domain, so one serves all sessions. Two threads that come first at once make one each.
  static OrtCustomOpDomain* shared = nullptr;
  OrtCustomOpDomain* domain = __atomic_load_n(&shared, __ATOMIC_ACQUIRE);
  if (domain == nullptr) {
    QWEN3VL_TRY(api.create_domain("qwen3vl.cpu", &domain));
    QWEN3VL_TRY(qwen3vl::add_products(domain));
    QWEN3VL_TRY(qwen3vl::add_attention(domain));
    __atomic_store_n(&shared, domain, __ATOMIC_RELEASE);
  }
  return api.add_domain(options, domain);
}
