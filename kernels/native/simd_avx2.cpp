// The kernel for AVX2 with FMA and F16C; compiled with those flags and nothing else with them.
#if defined(__x86_64__)
#define LLMFP_AVX2
#define LLMFP_LEVEL level_avx2
#define LLMFP_NAME "avx2"
#include "kernel.hpp"
#endif
