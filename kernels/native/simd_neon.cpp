// NEON: every aarch64 machine has it.
#include "kernel.hpp"

namespace llmfp {
#if defined(__aarch64__)
static const Level level = {"neon", marginals<Neon>, expand<Neon>, fold_unit};
const Level *const neon_level = &level;
#else
const Level *const neon_level = nullptr;
#endif
} // namespace llmfp
