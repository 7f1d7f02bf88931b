// AVX2 with FMA and F16C: compiled with those flags and nothing else with them.
#include "kernel.hpp"

namespace llmfp {
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
static const Level level = {"avx2", marginals<Avx2>, expand<Avx2>, fold_unit};
const Level *const avx2_level = &level;
#else
const Level *const avx2_level = nullptr;
#endif
} // namespace llmfp
