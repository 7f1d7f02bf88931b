"""llmfp: where does a language model come from? Fingerprints of attention weights, and the evidence between two.

    import llmfp
    fp = llmfp.scan("path/to/checkpoint")
    fp.std["q"]                # σ of every layer's query projection
    llmfp.compare(fp, "path/to/another").verdict

Importing this package imports neither torch nor NumPy; a scan on the CPU does not either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmfp.api import compare, load, scan
    from llmfp.errors import LlmfpError
    from llmfp.evidence.comparison import Comparison
    from llmfp.fingerprint import Fingerprint
    from llmfp.identification import Identification, identify
    from llmfp.registry import Registry

_HOME = {
    "Comparison": "llmfp.evidence.comparison",
    "Fingerprint": "llmfp.fingerprint",
    "Identification": "llmfp.identification",
    "LlmfpError": "llmfp.errors",
    "Registry": "llmfp.registry",
    "compare": "llmfp.api",
    "identify": "llmfp.identification",
    "load": "llmfp.api",
    "scan": "llmfp.api",
}
__all__ = [
    "Comparison", "Fingerprint", "Identification", "LlmfpError", "Registry", "__version__", "compare", "identify",
    "load", "scan",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmfp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
