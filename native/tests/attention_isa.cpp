// The attention of one instruction set (see isa.h) for the driver in attention_check.cpp.
#include "isa.h"

#include "../attention_plan.h"
#include "../lanes.h"

namespace QWEN3VL_ISA {
using namespace qwen3vl;

#include "../attention.h"

extern const AttentionFunction attend_function;
const AttentionFunction attend_function = attend;

}  // namespace QWEN3VL_ISA
