"""What the models are trained on: bytes of files that this machine has anyway, split the same way every time."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIMIT = 8_000_000
_SOURCES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "python": (sysconfig.get_path("stdlib"), lambda path: path.endswith(".py") and "site-packages" not in path),
    "c": ("/usr/include", lambda path: path.endswith(".h")),
    "prose": ("/usr/share/vim", lambda path: "/doc/" in path and path.endswith(".txt")),
}
CORPORA = tuple(_SOURCES)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes of whole files, uint8; about one file in twenty is for validation."""

    training: Tensor
    validation: Tensor

    @property
    def digest(self) -> str:
        """Tells whether another machine trained on the same text."""
        return hashlib.sha256(self.training.numpy().tobytes()).hexdigest()[:16]

    @property
    def unigram_loss(self) -> float:
        """Nats per byte of validation text for whoever knows only how often each byte occurs in training text."""
        counts = torch.bincount(self.training.int(), minlength=256).double() + 1
        return float(-(counts / counts.sum()).log()[self.validation.long()].mean())


@functools.cache
def corpus(name: str) -> Corpus:
    """At most LIMIT bytes, files by a hash of their relative paths. Raises SystemExit where they are too few."""
    root, wanted = _SOURCES[name]
    files = [path for path in Path(root).rglob("*") if wanted(str(path)) and path.is_file()]
    by_hash = sorted((hashlib.sha256(str(path.relative_to(root)).encode()).digest(), path) for path in files)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for digest, path in by_hash:
        content = path.read_bytes()[: LIMIT // 40]  # no single file may fill the corpus
        parts[digest[-1] < 256 // 20].append(content)
        total += len(content)
        if total > LIMIT:
            break
    if total < LIMIT // 4:
        raise SystemExit(f"{root}: only {total} bytes of {name} text; name another folder in {__file__}")
    training, validation = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return Corpus(training, validation)


def windows(text: Tensor, count: int, length: int, seed: int | None = None) -> Tensor:
    """int64 [count, length]: at random places, or without a seed evenly spaced."""
    last = len(text) - length
    if seed is None:
        starts = torch.linspace(0, last, count).long()
    else:
        starts = torch.randint(last, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(length)].long()
