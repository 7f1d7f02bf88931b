// AVX-512 (F, BW, DQ, VL): compiled with those flags and nothing else with them.
#include "kernel.hpp"

namespace llmfp {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
static const Level level = {"avx512", marginals<Avx512>, expand<Avx512>, fold_unit};
const Level *const avx512_level = &level;
#else
const Level *const avx512_level = nullptr;
#endif
} // namespace llmfp
