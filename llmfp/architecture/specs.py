"""The nouns of an architecture: roles, views, gains, towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from llmfp.checkpoint import TensorSpec


class Role(StrEnum):
    """What a projection does. Q, K and V read the residual stream, O writes it."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741

    @property
    def reads(self) -> bool:
        return self is not Role.O


ROLES = tuple(Role)


@dataclass(frozen=True, slots=True)
class WeightView:
    """One role's part of one stored 2-D tensor: groups × rows × columns of elements, in stored orientation.

    Element (g, i, j) is number start + g·group_stride + i·row_stride + j of the tensor. A plain matrix has one group;
    a fused tensor that interleaves Q, K and V per head has one group per head. `transposed` says that the tensor is
    stored [in, out] (Conv1D), so that its rows are the columns of W.
    """

    tensor: TensorSpec
    groups: int
    rows: int
    cols: int
    start: int
    group_stride: int
    row_stride: int
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the view's own elements."""
        return self.groups * self.rows * self.cols * self.tensor.itemsize

    @property
    def outputs(self) -> int:
        """Rows of W: what the projection computes."""
        return self.cols if self.transposed else self.groups * self.rows

    @property
    def inputs(self) -> int:
        """Columns of W: what it reads."""
        return self.groups * self.rows if self.transposed else self.cols


@dataclass(frozen=True, slots=True)
class NormGain:
    """The gain of a norm, float per residual coordinate; the effective gain is offset + the stored value."""

    tensor: TensorSpec
    offset: float


@dataclass(frozen=True, slots=True)
class Projection:
    """One role's weights in one layer, with what surrounds them.

    gain      of the norm before it (Q, K, V) or after it (O); None where that is 1
    centred   a LayerNorm removes the residual stream's mean, so the mean direction carries no meaning (EVIDENCE: J)
    head_dim  outputs (Q, K, V) or inputs (O) per head; None when unknown
    """

    layer: int
    role: Role
    view: WeightView
    gain: NormGain | None
    centred: bool
    head_dim: int | None

    @property
    def residual_size(self) -> int:
        return self.view.inputs if self.role.reads else self.view.outputs

    @property
    def residual_is_stored_rows(self) -> bool:
        """Whether the residual coordinates run along the stored rows; else along the stored columns."""
        return self.view.transposed == self.role.reads


@dataclass(frozen=True, slots=True)
class Tower:
    """One stack of layers. `heads`, `kv_heads`, `head_dim` are those of most layers, None when unknown."""

    name: str
    projections: tuple[Projection, ...]
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden_size: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({p.layer for p in self.projections}))


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """All attention projections of a checkpoint by tower. `skipped`: name → why no byte of that tensor is read."""

    family: str
    towers: tuple[Tower, ...]
    skipped: Mapping[str, str]
    caveats: tuple[str, ...]

    @property
    def main(self) -> Tower:
        """The language decoder, else the only encoder."""
        by_name = {tower.name: tower for tower in self.towers}
        return by_name.get("decoder") or by_name.get("encoder") or self.towers[0]
