// Find the instruction sets of this processor, and choose one.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace qwen3vl {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub_leaf) {
  Registers r;
  if (__get_cpuid_count(leaf, sub_leaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

bool has_bit(unsigned value, int bit) { return (value >> bit & 1) != 0; }

// The registers that the system saves (XCR0): without it, a thread would lose what they hold.
uint64_t saved_state() {
  if (!has_bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

bool has_avx2() {
  const unsigned c = cpuid(1, 0).c;
  return (saved_state() & kYmm) == kYmm && has_bit(c, 28) && has_bit(c, 12) && has_bit(c, 29) &&  // AVX, FMA, F16C
         has_bit(cpuid(7, 0).b, 5);
}

bool has_avx_vnni() { return has_avx2() && has_bit(cpuid(7, 1).a, 4); }

bool has_avx512_vnni() {
  const Registers r = cpuid(7, 0);
  return has_avx2() && (saved_state() & kZmm) == kZmm && has_bit(r.b, 16) && has_bit(r.b, 17) &&  // F, DQ
         has_bit(r.b, 30) && has_bit(r.b, 31) && has_bit(r.c, 11);                                // BW, VL, VNNI
}

bool has_amx_int8() {
  const unsigned d = cpuid(7, 0).d;
  return has_avx512_vnni() && (saved_state() & kTiles) == kTiles && has_bit(d, 24) && has_bit(d, 25);  // TILE, INT8
}

// Linux gives the tiles' registers only to a process that asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM): to all its threads, also
// those that it has, and to the processes that it forks. Their signal frames grow, so it is asked where tiles will be used,
// and refuses while a thread has a smaller stack for signals (sigaltstack(2)).
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#elif defined(__aarch64__)

bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }  // HWCAP_ASIMDDP

#endif

bool always() { return true; }

struct Choice {
  const Kernels* kernels;
  bool (*is_here)();
  bool (*request)();        // of the system, before the first use
  bool is_refused = false;  // by the system, when it was asked last

  bool can_be_used() {
    if (!is_here()) return false;
    const bool is_granted = request();
    __atomic_store_n(&is_refused, !is_granted, __ATOMIC_RELAXED);
    return is_granted;
  }
};

// Best first.
Choice choices[] = {
#if defined(__x86_64__)
    {&kAmxInt8, has_amx_int8, request_tiles},
    {&kAvx512Vnni, has_avx512_vnni, always},
    {&kAvxVnni, has_avx_vnni, always},
    {&kAvx2, has_avx2, always},
#elif defined(__aarch64__)
    {&kNeonDotprod, has_dotprod, always},
#endif
    {&kPortable, always, always},
};

const Kernels* best() {
  for (Choice& choice : choices) {
    if (choice.can_be_used()) return choice.kernels;
  }
  return &kPortable;
}

// The instruction set in use. Threads may ask while one chooses; which of two they get does not matter, since all compute
// the same bits.
const Kernels* chosen = nullptr;

const Kernels& in_use() {
  const Kernels* found = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  if (found == nullptr) {
    found = best();
    __atomic_store_n(&chosen, found, __ATOMIC_RELEASE);
  }
  return *found;
}

}  // namespace

const Kernels& kernels() { return in_use(); }

}  // namespace qwen3vl

#define QWEN3VL_PUBLIC extern "C" __attribute__((visibility("default")))

QWEN3VL_PUBLIC int qwen3vl_cpu_version() { return 1; }

QWEN3VL_PUBLIC const char* qwen3vl_cpu_isas() {
  static char names[256];
  names[0] = '\0';
  for (const auto& choice : qwen3vl::choices) {
    if (!choice.is_here() || __atomic_load_n(&choice.is_refused, __ATOMIC_RELAXED)) continue;
    if (names[0] != '\0') std::strcat(names, ",");
    std::strcat(names, choice.kernels->name);
  }
  return names;
}

QWEN3VL_PUBLIC const char* qwen3vl_cpu_isa() { return qwen3vl::kernels().name; }

// 0: it is used now; -1: there is none of that name for this processor; -2: the system refuses it.
QWEN3VL_PUBLIC int qwen3vl_cpu_use(const char* name) {
  for (auto& choice : qwen3vl::choices) {
    if (std::strcmp(choice.kernels->name, name) != 0 || !choice.is_here()) continue;
    if (!choice.can_be_used()) return -2;
    __atomic_store_n(&qwen3vl::chosen, choice.kernels, __ATOMIC_RELEASE);
    return 0;
  }
  return -1;
}
