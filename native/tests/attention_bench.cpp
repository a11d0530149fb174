// Times one attention layer of the 2B shape, 16 query and 8 key-value heads of 128, on several threads: milliseconds, and the
// bytes of the cache read a second. Compiled and linked as attention_check.cpp, with -pthread.
//
//   attention_bench [threads] [megabytes]      caches of so many megabytes are taken in turn, so that none lies in a core's own
#include "attention_case.h"

#include <initializer_list>

#include <pthread.h>
#include <time.h>

// Of all threads together, with one: what others do on the machine matters less.
static double now_ms() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) * 1e-6;
}

// Threads that wait for work by spinning, as those of ONNX Runtime do while a session runs.
struct Pool {
  int num_threads;
  volatile bool is_over = false;
  int64_t round = 0;  // even: waiting
  int64_t next = 0, num_tasks = 0, num_busy = 0;
  const Case* work = nullptr;
  AttentionFunction attend = nullptr;
  int phase = 0;

  void take_tasks() {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_ACQ_REL)) < num_tasks;) {
      attend(work->a, phase, task, work->scratch.start);
    }
  }
  static void* main(void* pool) {
    Pool& self = *static_cast<Pool*>(pool);
    for (int64_t seen = 0;;) {
      while (__atomic_load_n(&self.round, __ATOMIC_ACQUIRE) == seen) {
        if (self.is_over) return nullptr;
        __builtin_ia32_pause();
      }
      ++seen;
      self.take_tasks();
      __atomic_fetch_sub(&self.num_busy, 1, __ATOMIC_ACQ_REL);
    }
  }
  void run(const Case& c, AttentionFunction function) {
    work = &c;
    attend = function;
    for (phase = 0; phase < kAttentionPhases; ++phase) {
      num_tasks = attention_num_tasks(c.a, phase);
      if (num_tasks == 1) {
        attend(c.a, phase, 0, c.scratch.start);
      } else if (num_tasks > 1) {
        next = 0;
        num_busy = num_threads - 1;
        __atomic_fetch_add(&round, 1, __ATOMIC_ACQ_REL);
        take_tasks();
        while (__atomic_load_n(&num_busy, __ATOMIC_ACQUIRE) > 0) __builtin_ia32_pause();
      }
    }
  }
};

static int by_value(const void* x, const void* y) {
  const double a = *static_cast<const double*>(x), b = *static_cast<const double*>(y);
  return a < b ? -1 : a > b;
}

static void set(Case& c, CacheType type, int64_t batch, int64_t num_tokens, int64_t past) {
  Random random;
  c.a.cache_type = type;
  c.a.batch = batch;
  c.a.num_tokens = num_tokens;
  c.a.num_heads = 16;
  c.a.num_kv_heads = 8;
  c.a.head_dim = 128;
  c.a.capacity = past + num_tokens;
  c.a.scale = 0.088f;
  c.a.epsilon = 1e-6f;
  for (int64_t b = 0; b < batch; ++b) c.past[b] = past;
  c.make(random, 0, true);
}

static void time_case(Pool& pool, const Isa& isa, CacheType type, int64_t batch, int64_t num_tokens, int64_t past, size_t megabytes) {
  static constexpr const char* names[] = {"float32", "float16", "int8", "int4"};
  static Case cases[256];
  set(cases[0], type, batch, num_tokens, past);
  const size_t bytes = 2 * cases[0].cache_bytes();
  size_t count = megabytes * 1000000 / bytes + 1;
  if (count > 256) count = 256;
  for (size_t i = 1; i < count; ++i) set(cases[i], type, batch, num_tokens, past);
  double times[400];
  int num_times = 0;
  const double start = now_ms();
  for (int i = 0; i < 400 && (num_times < 5 || now_ms() - start < 600); ++i) {
    const double before = now_ms();
    pool.run(cases[static_cast<size_t>(i) % count], isa.attend);
    times[num_times++] = now_ms() - before;
  }
  qsort(times, static_cast<size_t>(num_times), sizeof(double), by_value);
  const double median = times[num_times / 2];
  printf("%-9s %-8s B %lld S %4lld past %5lld: %8.4f ms (least %.4f)", isa.name, names[static_cast<int>(type)],
         static_cast<long long>(batch), static_cast<long long>(num_tokens), static_cast<long long>(past), median, times[0]);
  if (num_tokens == 1) printf("  %.1f GB/s", static_cast<double>(bytes) * 1e-6 / median);
  const double products = static_cast<double>(batch) * 16 * 128 * 2 * static_cast<double>(num_tokens) *
                          (static_cast<double>(past) + static_cast<double>(num_tokens + 1) / 2);
  printf("  %.0f GFLOP/s\n", 2 * products * 1e-6 / median);
}

int main(int argc, char** argv) {
  Pool pool;
  pool.num_threads = argc > 1 ? atoi(argv[1]) : 2;
  const size_t megabytes = static_cast<size_t>(argc > 2 ? atoi(argv[2]) : 0);
  pthread_t threads[64];
  for (int i = 1; i < pool.num_threads; ++i) pthread_create(&threads[i], nullptr, Pool::main, &pool);
  Isa list[4];
  const int count = isas(list);
  static constexpr CacheType types[4] = {CacheType::kFloat32, CacheType::kFloat16, CacheType::kInt8, CacheType::kInt4};
  for (int i = count - 1; i >= 1; --i) {
    for (CacheType type : types) {
      for (int64_t past : {20, 300, 1000, 3000}) time_case(pool, list[i], type, 1, 1, past, megabytes);
      time_case(pool, list[i], type, 1, 4, 1000, megabytes);
      time_case(pool, list[i], type, 8, 1, 300, megabytes);
      for (int64_t past : {0, 512}) time_case(pool, list[i], type, 1, 512, past, megabytes);
    }
  }
  pool.is_over = true;
  for (int i = 1; i < pool.num_threads; ++i) pthread_join(threads[i], nullptr);
}
