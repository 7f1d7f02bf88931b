// The kernel for NEON, which every aarch64 machine has.
#if defined(__aarch64__)
#define LLMFP_NEON
#define LLMFP_LEVEL level_neon
#define LLMFP_NAME "neon"
#include "kernel.hpp"
#endif
