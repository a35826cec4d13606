#include "level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef SPNET_AMX_KERNELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace spnet::cpu {
namespace {

// `what` is what the name was given to.
Level find_level(const std::string& what, const std::string& name) {
  std::string known;
  for (const Level candidate : levels()) {
    if (name == level_name(candidate)) return candidate;
    known += known.empty() ? "" : ", ";
    known += level_name(candidate);
  }
  throw std::invalid_argument(what + ": expected one that this processor runs (" + known + "), got " + name);
}

Level first_level() {
  const char* name = std::getenv("SPNET_CPU_LEVEL");
  return name == nullptr || *name == 0 ? levels().back() : find_level("SPNET_CPU_LEVEL", name);
}

std::atomic<Level>& current() {
  static std::atomic<Level> value{first_level()};
  return value;
}

#ifdef SPNET_AMX_KERNELS
// A process must ask Linux for the matrix registers before it uses them.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBfloat16) || !(edx & kTiles)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

std::vector<Level> levels() {
#if defined(__x86_64__)
  std::vector<Level> result{Level::v2};
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, which not all compilers let one ask for.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return result;
  result.push_back(Level::avx2);
#ifdef SPNET_AVX512_KERNELS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    result.push_back(Level::avx512);
#ifdef SPNET_AMX_KERNELS
    static const bool amx = has_amx();
    if (amx && __builtin_cpu_supports("avx512bf16")) result.push_back(Level::amx);
#endif
  }
#endif
  return result;
#else
  return {Level::generic};
#endif
}

Level level() { return current().load(std::memory_order_relaxed); }

void set_level(const std::string& name) {
  current().store(find_level("level", name), std::memory_order_relaxed);
}

const char* level_name(Level level) {
#define SPNET_NAME(level) #level,
  constexpr const char* kNames[] = {SPNET_FOR_EACH_LEVEL(SPNET_NAME)};
#undef SPNET_NAME
  return kNames[static_cast<int>(level)];
}

}  // namespace spnet::cpu
