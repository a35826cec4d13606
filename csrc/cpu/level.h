// Which of the compiled instruction-set levels this process uses.
//
// The sources listed as SPNET_LEVEL_SOURCES in CMakeLists.txt are compiled once per level, each into a
// namespace of the level's name. They must not use inline functions of the standard library: the linker keeps
// one copy of such a function, and that copy could contain instructions which the machine lacks.
#pragma once

#include <string>
#include <vector>

#if defined(SPNET_AVX512_KERNELS)
#define SPNET_FOR_EACH_BUILD(X) X(v2) X(avx2) X(avx512)
#define SPNET_FOR_EACH_LEVEL(X) SPNET_FOR_EACH_BUILD(X) X(amx)
#elif defined(__x86_64__)
#define SPNET_FOR_EACH_BUILD(X) X(v2) X(avx2)
#define SPNET_FOR_EACH_LEVEL(X) SPNET_FOR_EACH_BUILD(X)
#else
#define SPNET_FOR_EACH_BUILD(X) X(generic)
#define SPNET_FOR_EACH_LEVEL(X) SPNET_FOR_EACH_BUILD(X)
#endif

namespace spnet::cpu {

#if defined(SPNET_AVX512_KERNELS)
// Matrix registers multiply bfloat16 alone: whatever is float32 is that of the level below.
namespace avx512 {}
namespace amx = avx512;
#endif

#define SPNET_ENUMERATE(level) level,
enum class Level { SPNET_FOR_EACH_LEVEL(SPNET_ENUMERATE) };
#undef SPNET_ENUMERATE

// The levels that this processor runs, ascending.
std::vector<Level> levels();

// The level in use: the highest of levels(), unless the environment variable SPNET_CPU_LEVEL or set_level
// chose another. Throws std::invalid_argument while the variable names a level that is not one of levels().
Level level();

// Chooses one of levels() for the whole process, for tests and measurements.
// Throws std::invalid_argument for any other name.
void set_level(const std::string& name);

const char* level_name(Level level);

}  // namespace spnet::cpu
