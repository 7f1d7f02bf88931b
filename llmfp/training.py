"""Fingerprint drift during training: how far σ of every attention matrix has moved since the first step.

    from llmfp.training import trainer_callback

    Trainer(…, callbacks=[trainer_callback()]).train()

adds `fingerprint_drift_q` (k, v, o) to what the Trainer logs: the mean over the layers of |ln(σ / σ₀)|, 0.01 for one
per cent. Weights are read where they are; on a sharded model every process measures, and gathers one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmfp.api import scan

if TYPE_CHECKING:
    import torch

    from llmfp.fingerprint import Fingerprint


class FingerprintDrift:
    """Measures a model against its first fingerprint; with transformers' names for the moments when it does.

    tower    as in llmfp.scan
    history  what was measured so far, by step
    """

    def __init__(self, tower: str | None = None) -> None:
        self.history: dict[int, dict[str, float]] = {}
        self._tower = tower
        self._first: Fingerprint | None = None

    def measure(self, model: torch.nn.Module, step: int) -> Mapping[str, float]:
        """Drift of every role at this step, measured once; all 0 the first time. Raises LlmfpError as scan does."""
        if step not in self.history:
            now = scan(model, tower=self._tower)
            self._first = self._first or now
            self.history[step] = {
                f"fingerprint_drift_{role}": drift
                for role, column in now.std.items()
                if (drift := _drift(self._first.std[role], column)) is not None
            }
        return self.history[step]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """The fingerprint to compare with; fails here, before the first step, where the model is not understood."""
        self.measure(model, state.global_step)

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Adds the drift to what is logged, for the callbacks behind this one, and to the Trainer's log_history."""
        found = self.measure(model, state.global_step)
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update(found)


def trainer_callback(tower: str | None = None) -> Any:
    """A transformers.TrainerCallback that is a FingerprintDrift. Raises ImportError without transformers."""
    from transformers import TrainerCallback

    return type("FingerprintCallback", (FingerprintDrift, TrainerCallback), {})(tower)


def _drift(first: Sequence[float | None], now: Sequence[float | None]) -> float | None:
    """Mean of |ln(σ / σ₀)| over the layers that have both; None where none has."""
    moved = [abs(math.log(b / a)) for a, b in zip(first, now, strict=True) if a and b]
    return sum(moved) / len(moved) if moved else None


__all__ = ["FingerprintDrift", "trainer_callback"]
