"""llmfp: where does a language model come from? Fingerprints of attention weights, and the evidence between two.

    import llmfp
    fp = llmfp.scan("path/to/checkpoint")
    fp.std["q"]                # σ of every layer's query projection

Importing this package imports neither torch nor NumPy; a scan on the CPU does not either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmfp.api import load, scan
    from llmfp.errors import LlmfpError
    from llmfp.fingerprint import Fingerprint

_HOME = {
    "Fingerprint": "llmfp.fingerprint",
    "LlmfpError": "llmfp.errors",
    "load": "llmfp.api",
    "scan": "llmfp.api",
}
__all__ = ["Fingerprint", "LlmfpError", "__version__", "load", "scan"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmfp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
