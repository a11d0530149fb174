// Norm, rotary embedding, cache update and causal grouped-query attention of one instruction set. Included by its file inside
// its namespace, after lanes.h; attention_plan.h says how it is called.
//
// Float32 throughout; the softmax is taken in chunks of rows of the cache (online softmax: Milakov and Gimelshein 2018;
// the chunks of values under a running maximum: FlashAttention, Dao et al. 2022).

// A namespace of its own, so that no name in here hides one that the products use.
namespace attention {

#include "attention_cache.h"
#include "attention_prepare.h"
#include "attention_decode.h"
#include "attention_prefill.h"

template <class Cache>
static void attend_as(const Attention& a, int phase, int64_t task, float* queries, float* partials) {
  if (phase == 0) return prepare<Cache>(a, task, queries);
  if (phase == 2) return combine<Cache>(a, task, partials);
  if (a.is_step()) return attend_split<Cache>(a, task, queries, partials);
  attend_block<Cache>(a, task, queries);
}

static void attend(const Attention& a, int phase, int64_t task, void* scratch) {
  float* queries = static_cast<float*>(scratch);
  float* partials = queries + a.query_floats();
  switch (a.cache_type) {
    case CacheType::kFloat32:
      return attend_as<Float32Cache>(a, phase, task, queries, partials);
    case CacheType::kFloat16:
      return attend_as<Float16Cache>(a, phase, task, queries, partials);
    case CacheType::kInt8:
      return attend_as<Int8Cache>(a, phase, task, queries, partials);
    case CacheType::kInt4:
      return attend_as<Int4Cache>(a, phase, task, queries, partials);
  }
}

}  // namespace attention

using attention::attend;
