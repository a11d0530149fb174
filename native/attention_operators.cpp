#include "operators.h"
namespace qwen3vl { OrtStatus* add_attention(OrtCustomOpDomain*) { return nullptr; } }
