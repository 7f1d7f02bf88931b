// The kernel for AVX-512 (F, BW, DQ, VL); compiled with those flags and nothing else with them.
#if defined(__x86_64__)
#define LLMFP_AVX512
#define LLMFP_LEVEL level_avx512
#define LLMFP_NAME "avx512"
#include "kernel.hpp"
#endif
