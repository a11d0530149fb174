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

// Linux gives the tiles' registers only to a process that asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM); its signal frames grow,
// so it is asked where they will be used.
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
  bool (*request)();    // of the system, before the first use
  bool is_by_name_only;  // it has not run on such a processor yet, so it is taken where it is asked for

  bool can_be_used() const { return is_here() && request(); }
};

// Best first.
const Choice kChoices[] = {
#if defined(__x86_64__)
    {&kAmxInt8, has_amx_int8, request_tiles, true},
    {&kAvx512Vnni, has_avx512_vnni, always, false},
    {&kAvxVnni, has_avx_vnni, always, false},
    {&kAvx2, has_avx2, always, false},
#elif defined(__aarch64__)
    {&kNeonDotprod, has_dotprod, always, false},
#endif
    {&kPortable, always, always, false},
};

const Kernels* best() {
  for (const Choice& choice : kChoices) {
    if (!choice.is_by_name_only && choice.can_be_used()) return choice.kernels;
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
  for (const auto& choice : qwen3vl::kChoices) {
    if (!choice.is_here()) continue;
    if (names[0] != '\0') std::strcat(names, ",");
    std::strcat(names, choice.kernels->name);
  }
  return names;
}

QWEN3VL_PUBLIC const char* qwen3vl_cpu_isa() { return qwen3vl::kernels().name; }

QWEN3VL_PUBLIC int qwen3vl_cpu_use(const char* name) {
  for (const auto& choice : qwen3vl::kChoices) {
    if (std::strcmp(choice.kernels->name, name) != 0 || !choice.can_be_used()) continue;
    __atomic_store_n(&qwen3vl::chosen, choice.kernels, __ATOMIC_RELEASE);
    return 0;
  }
  return -1;
}
