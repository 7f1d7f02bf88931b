// The kernel in plain C++, for machines with none of the others and to check them against.
#define LLMFP_LEVEL level_scalar
#define LLMFP_NAME "scalar"
#include "kernel.hpp"
