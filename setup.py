"""The C++ extension and nothing else; all metadata is in pyproject.toml.

Each SIMD level is its own translation unit with its own flags, chosen at run time: the wheel runs on any machine of
its architecture and `-march=native` never appears. `-ffp-contract=off` keeps the compiler from fusing what the source
does not fuse, so that all levels agree to the bit.
"""

import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "kernels/native"
X86 = platform.machine().lower() in ("x86_64", "amd64")
HEADERS = (
    "decode.hpp",
    "ggml.hpp",
    "ggml_types.inc",
    "job.hpp",
    "kernel.hpp",
    "lanes.hpp",
    "pages.hpp",
    "segment.hpp",
    "words.h",
)
LEVELS = {
    "simd_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "simd_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildPerLevel(build_ext):
    """Compiles each SIMD level with its own flags and nothing else with them."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def with_level(obj, src, extension, cc_args, extra_postargs, pp_opts):
            flags = LEVELS.get(src.rsplit("/", 1)[-1], []) if X86 else []
            compile_one(obj, src, extension, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = with_level
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


setup(
    cmdclass={"build_ext": BuildPerLevel},
    ext_modules=[
        Extension(
            "llmfp._native",
            sources=[
                f"{SOURCES}/{name}.cpp" for name in ("module", "simd_avx512", "simd_avx2", "simd_neon", "simd_scalar")
            ],
            depends=[f"{SOURCES}/{name}" for name in HEADERS],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"],
            # A source install without a compiler still works on NumPy; `llmfp-fast backends` says what is missing.
            optional=sys.platform != "win32",
        )
    ],
)
