"""The back ends: four implementations of the same six verbs, one of them the definition.

`reference` is the truth (float64, NumPy, a page); `native_cpu` is what a scan runs; `torch_fallback` runs wherever
torch runs; `triton_gpu` runs on a GPU, or interpreted for tests. Modules are imported when they are asked for, so that
a native scan imports neither NumPy nor torch. "Add a backend" is described in README.md beside this file.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from llmfp.errors import BackendError
from llmfp.marginals import Buffer, Chunk, Marginals, Moments

BACKENDS = ("native_cpu", "torch_fallback", "triton_gpu", "reference")
"""Every back end, best first for `auto` on a machine without a GPU."""


class Backend(Protocol):
    """What the engine needs of a back end. All arrays are as described in llmfp.marginals."""

    name: str
    dtypes: frozenset[str]
    """Stored dtypes this back end reduces, by their safetensors names."""
    library_bytes: int
    """Resident bytes that importing this back end's libraries costs; counted against the memory budget."""
    scratch_per_element: int
    """Bytes of temporary memory `marginals` needs per element of one unit."""
    scratch_per_code: int
    """The same, on top of it, where elements are decoded or an adapter adds to them."""
    takes_tensors: bool
    """Whether a chunk's data may be a flat uint8 torch tensor, on any device that the back end computes on."""
    guards_mapped_pages: bool
    """Whether `marginals` survives (OSError) a mapped file that shrinks under it; otherwise chunks are copied first."""

    def why_unavailable(self) -> str | None:
        """None when usable here, else the reason in a few words."""

    def describe(self) -> str:
        """The variant in use, for `run.simd`: a SIMD level, a device."""

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that compute, for `run.versions`."""

    def marginals(self, chunk: Chunk) -> Marginals:
        """Row and column statistics of every unit of the chunk; each stored byte is read from memory once."""

    def expand(self, chunk: Chunk, out: Buffer) -> None:
        """The chunk's elements times its weights as float32 [rows, cols] into `out`; NaN where they are not finite."""

    def merge(self, parts: Sequence[Marginals]) -> Marginals:
        """Consecutive parts as one: rows concatenated, columns folded left to right, unit by unit (Chan 1979)."""

    def pool(self, moments: Moments, count: int, block: int) -> Moments:
        """Each run of `block` consecutive entries, of `count` elements each, as one; `block` divides their number."""

    def log_rms(
        self,
        moments: Moments,
        count: int,
        weight: Buffer | None = None,
        cross: Buffer | None = None,
        centre_square: float = 0.0,
    ) -> Buffer:
        """float16 log RMS of every entry of one axis: the effective residual profile.

        moments are those of `count` plain elements each; with w = weight (1 without) and q = mean^2 + m2 / count:
        ½·log(w²·q) plain, or, where a LayerNorm centres (cross given), ½·log(w²·q - 2·w·cross/count + centre_square).
        """


@runtime_checkable
class Deferring(Backend, Protocol):
    """A back end whose statistics may stay on a device until they are wanted."""

    def device_bytes(self, chunk: Chunk) -> tuple[int, int]:
        """Device memory beside the chunk's own that its sums take, about: while they are computed; until fetched."""

    def launch(self, chunks: Sequence[Chunk]) -> Any:
        """Has chunks on one device reduced, without waiting for it; the result has a `device`, for `fetch`."""

    def fetch(self, launched: Sequence[Any]) -> list[list[Marginals]]:
        """What launches on one device came to, in one copy back."""


def load(name: str) -> Backend:
    """The back end of that name, usable or not. Raises BackendError for a name that does not exist."""
    if name not in BACKENDS:
        raise BackendError(f"no back end named {name!r}", hint=f"choose one of {', '.join(BACKENDS)}")
    backend: Backend = importlib.import_module(f"llmfp.kernels.{name}").BACKEND
    return backend


def on(device: str, name: str = "auto") -> tuple[Backend, str]:
    """The best back end for a torch device, or the named one, and, where it is not the fused one, why; else ''.

    Raises BackendError for a device, or a back end, that cannot be used."""
    from llmfp.kernels.torch_fallback import TorchFallback

    if name in ("native_cpu", "reference"):
        raise BackendError(f"back end {name} computes on the CPU, not on {device}", hint="leave out --backend")
    reason = f"Triton has no kernels for {device.partition(':')[0]}"
    if name == "torch_fallback":
        reason = "asked for"
    elif device.startswith("cuda"):
        from llmfp.kernels.triton_gpu import TritonGpu

        fused = TritonGpu(device)
        reason = fused.why_unavailable() or fused.why_broken() or ""
        if not reason:
            return fused, ""
    if name == "triton_gpu":
        raise BackendError(f"back end {name} cannot run on {device}: {reason}", hint="leave out --backend")
    plain = TorchFallback(device)
    if why := plain.why_unavailable():
        raise BackendError(f"device {device} cannot be used: {why}", hint="llmfp-fast backends lists what can run here")
    return plain, f"pure torch computes on {device}: {reason}"


def select(name: str = "auto") -> Backend:
    """The usable back end to run: the named one, or the first of BACKENDS that can run here."""
    if name != "auto":
        backend = load(name)
        if reason := backend.why_unavailable():
            raise BackendError(f"back end {name} cannot run here: {reason}", hint="llmfp-fast backends lists them all")
        return backend
    for candidate in ("native_cpu", "reference"):
        backend = load(candidate)
        if backend.why_unavailable() is None:
            return backend
    raise BackendError("no back end can run here", hint="llmfp-fast backends says why for each")
