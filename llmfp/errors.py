"""Everything that can go wrong for a reason the user can act on.

Every error is one line that names the file and, where there is one, the tensor; `hint` says what to do.
The command line prints both and exits with `exit_code`; nothing else in the project calls `sys.exit`.
"""

from __future__ import annotations


class LlmfpError(Exception):
    """Base of all errors the project raises on purpose. `hint` is one imperative sentence, or empty."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(LlmfpError):
    """The stored files are missing, malformed, contradictory or changed while they were read."""


class EncodingError(LlmfpError):
    """A stored dtype or packing that the chosen back end cannot read."""


class ArchitectureError(LlmfpError):
    """No attention weights were recognised, or their shapes cannot be what their names say."""


class PlanError(LlmfpError):
    """The work does not fit the memory budget."""


class BackendError(LlmfpError):
    """The requested back end cannot run here."""


class FingerprintError(LlmfpError):
    """A fingerprint file that is truncated, of another schema, or no fingerprint at all."""


class HubError(LlmfpError):
    """A server that cannot be reached, refuses, or answers with something else than what was asked for."""
