#include "isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__AMX_INT8__) && !defined(GLM_HAS_AMX)  // make sanitize
#define GLM_HAS_AMX
#endif
#if defined(GLM_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace glmlocal {

#if defined(GLM_ONLY_ISA)  // one that the compiler was told this CPU has (make sanitize)
namespace GLM_ONLY_ISA { extern const KernelTable table; }
#else
namespace generic { extern const KernelTable table; }
#if defined(__x86_64__)
namespace avx2 { extern const KernelTable table; }
#if defined(GLM_HAS_AVX_VNNI)
namespace avx_vnni { extern const KernelTable table; }
#endif
namespace avx512 { extern const KernelTable table; }
#if defined(GLM_HAS_AMX)
namespace amx { extern const KernelTable table; }
#endif
#endif
#endif

namespace {

#if defined(GLM_HAS_AVX_VNNI)
bool has_avx_vnni() {  // GCC 12's __builtin_cpu_supports does not know it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

#if defined(GLM_HAS_AMX)
// Whether this CPU multiplies tiles of int8 and Linux lets this process use them, for which it must be asked once
// (Documentation/arch/x86/xstate.rst). It refuses where a signal stack that is in use is too small for the tiles.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & (tile | int8)) != (tile | int8)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}
#endif

std::vector<const KernelTable*> supported_tables() {
#if defined(GLM_ONLY_ISA)
#if defined(GLM_HAS_AMX)
  has_amx();  // asks for the tiles
#endif
  return {&GLM_ONLY_ISA::table};
#else
  std::vector<const KernelTable*> tables{&generic::table};
#if defined(__x86_64__)
  // These builtins also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&avx2::table);
#if defined(GLM_HAS_AVX_VNNI)
    if (has_avx_vnni()) tables.push_back(&avx_vnni::table);
#endif
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
      tables.push_back(&avx512::table);
#if defined(GLM_HAS_AMX)
      if (has_amx()) tables.push_back(&amx::table);
#endif
    }
  }
#endif
  return tables;
#endif
}

std::atomic<const KernelTable*> chosen{supported_tables().back()};

}  // namespace

const KernelTable& kernels() { return *chosen.load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_tables()) names.emplace_back(table->name);
  return names;
}

std::string isa() { return kernels().name; }

bool set_isa(const std::string& name) {
  for (const KernelTable* table : supported_tables()) {
    if (name == table->name) {
      chosen.store(table);
      return true;
    }
  }
  return false;
}

}  // namespace glmlocal
