// Plain C++ for any machine, and what the others are checked against.
#include "kernel.hpp"

namespace llmfp {
static const Level level = {"scalar", marginals<Scalar>, expand<Scalar>, fold_unit};
const Level *const scalar_level = &level;
} // namespace llmfp
