"""The nouns of an architecture: roles, views, gains, towers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from llmfp.checkpoint import TensorSpec


class Role(StrEnum):
    """What a projection does: Q, K, V, O, or a factor of them in latent attention (K and V share KV or KV_A, KV_B).

    K_B and V_B are KV_B in two tensors: per head one that makes its key, transposed, and one that makes its value.
    """

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741
    Q_A = "q_a"
    Q_B = "q_b"
    KV_A = "kv_a"
    KV_B = "kv_b"
    KV = "kv"
    O_A = "o_a"
    O_B = "o_b"
    K_B = "k_b"
    V_B = "v_b"

    @property
    def whole(self) -> Role:
        """What statistics are kept of: itself, or what it is stored as a part of."""
        return Role.KV_B if self in (Role.K_B, Role.V_B) else self

    @property
    def reads(self) -> bool:
        """Whether its inputs are the residual stream."""
        return self in (Role.Q, Role.K, Role.V, Role.Q_A, Role.KV_A, Role.KV)

    @property
    def writes(self) -> bool:
        """Whether its outputs are the residual stream; the second of two factors does neither."""
        return self in (Role.O, Role.O_B)

    @property
    def heads_at_outputs(self) -> bool:
        """Whether heads run along its outputs; else along its inputs."""
        return self not in (Role.O, Role.O_A, Role.O_B)


ROLES = (Role.Q, Role.K, Role.V, Role.O)
"""The roles every plain attention layer has."""


@dataclass(frozen=True, slots=True)
class WeightView:
    """One role's part of one stored tensor: groups × rows × columns of elements, in stored orientation.

    Element (g, i, j) is number start + g·group_stride + i·row_stride + j of the tensor. A plain matrix has one group;
    a fused tensor that interleaves Q, K and V per head has one group per head. `transposed` says that the tensor is
    stored [in, out] (Conv1D, GPTQ), so that its rows are the columns of W: then groups are runs of columns of the same
    rows, else runs of rows.
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
        rows, cols = self.tensor.shape
        return self.groups * self.rows * self.cols * self.tensor.nbytes // (rows * cols)

    @property
    def col_runs(self) -> int:
        """Runs of stored columns that it is made of."""
        return self.groups if self.transposed else 1

    @property
    def row_runs(self) -> int:
        """Runs of stored rows that it is made of."""
        return 1 if self.transposed else self.groups

    @property
    def all_cols(self) -> int:
        """Stored columns in all runs."""
        return self.col_runs * self.cols

    @property
    def outputs(self) -> int:
        """Rows of W: what the projection computes."""
        return self.all_cols if self.transposed else self.groups * self.rows

    @property
    def inputs(self) -> int:
        """Columns of W: what it reads."""
        return self.rows if self.transposed else self.cols


@dataclass(frozen=True, slots=True)
class NormGain:
    """The gain of a norm, float per residual coordinate; the effective gain is offset + the stored value."""

    tensor: TensorSpec
    offset: float


@dataclass(frozen=True, slots=True)
class Rotary:
    """Which rows of a query or key head a rotary embedding turns, by pairs of descending frequency.

    pairs        how many; the rows behind the first 2 · pairs of a head, in latent attention those before the last
                 2 · pairs, are not turned
    interleaved  a pair is rows 2i and 2i + 1 of those that are; else rows i and i + pairs
    """

    pairs: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Projection:
    """One role's weights in one layer, with what surrounds them.

    gain      of the norm before it (Q, K, V; for Q_B and KV_B that on the latent) or after it (O); None where that is 1
    centred   a LayerNorm removes the residual stream's mean, so the mean direction carries no meaning (EVIDENCE: J)
    head_dim  outputs (Q, K, V) or inputs (O) per head; None when unknown, and where a factor has no heads
    """

    layer: int
    role: Role
    view: WeightView
    gain: NormGain | None
    centred: bool
    head_dim: int | None

    @property
    def residual_size(self) -> int | None:
        """Coordinates of the residual stream that it reads or writes; None for a factor inside latent attention."""
        if self.role.reads:
            return self.view.inputs
        return self.view.outputs if self.role.writes else None

    @property
    def residual_is_stored_rows(self) -> bool:
        """Whether the residual coordinates run along the stored rows, and heads along the stored columns."""
        return self.view.transposed == self.role.heads_at_outputs


@dataclass(frozen=True, slots=True)
class Vector:
    """A bias or a gain next to attention, of which σ and mean are kept: `q_bias`, `k_bias`, `v_bias`, `norm` (in front
    of Q, K, V), `post_norm` (behind O), `q_latent_norm` and `kv_latent_norm` (in front of Q_B and KV_B or V_B).

    view    rows × columns within a 1-D tensor: one row, or one per group where its weights are interleaved
    offset  added to the stored mean: the gain of a norm that multiplies by 1 + weight
    """

    layer: int
    role: str
    view: WeightView
    offset: float


@dataclass(frozen=True, slots=True)
class Tower:
    """One stack of layers. `heads`, `kv_heads`, `head_dim` are those of most layers, None when unknown.

    rotary         of its queries and keys; None without a rotary embedding, or where it is not known
    unrotated      layers without one all the same
    indexed_heads  heads differ by design (ALiBi's slopes, T5's biases), so their order carries meaning
    """

    name: str
    projections: tuple[Projection, ...]
    vectors: tuple[Vector, ...]
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden_size: int
    rotary: Rotary | None
    unrotated: frozenset[int]
    indexed_heads: bool

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({p.layer for p in self.projections}))

    @property
    def roles(self) -> tuple[str, ...]:
        """Names under which statistics are kept: q, k, v, o, then latent factors, then biases and gains as stored."""
        factors = (str(role) for role in Role if any(p.role.whole is role for p in self.projections))
        return tuple(dict.fromkeys([*map(str, ROLES), *factors, *(vector.role for vector in self.vectors)]))


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Which rows of a projection's W, of O's which columns, make up one part of every head.

    The projection puts `stride` rows a head side by side, `heads` times; the part is the `size` from the `first` on.
    """

    role: Role
    heads: int
    size: int
    stride: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """One layer's projections whose heads can be told apart: queries and keys at least, values and O where they fit.

    q, k     whole heads; in latent attention the rows that no rotary embedding turns, of as many keys as queries
    turned   the rows of queries and keys whose first 2 · pairs the rotary embedding turns: q and k themselves; in
             latent attention others, of one key that all heads share. None where this layer has no rotary embedding
    crossed  these again where both read the same space, so that they can be multiplied, else None
    """

    layer: int
    q: HeadRows
    k: HeadRows
    v: HeadRows | None
    o: HeadRows | None
    turned: tuple[HeadRows, HeadRows] | None
    crossed: tuple[HeadRows, HeadRows] | None
    projections: Mapping[Role, Projection]
    rotary: Rotary | None

    @property
    def parts(self) -> tuple[HeadRows, ...]:
        """All of them, each once."""
        every = (self.q, self.k, self.v, self.o, *(self.turned or ()))
        return tuple(dict.fromkeys(rows for rows in every if rows is not None))

    def asks(self, roles: Collection[Role]) -> bool:
        """Whether these roles, stored side by side, hold queries to be multiplied and not their keys."""
        return self.crossed is not None and self.crossed[0].role in roles and self.crossed[1].role not in roles

    def answers(self, roles: Collection[Role]) -> Role | None:
        """The one among them that holds the keys of queries stored elsewhere."""
        if self.crossed is None or self.crossed[0].role in roles or self.crossed[1].role not in roles:
            return None
        return self.crossed[1].role


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """All attention projections of a checkpoint by tower. `skipped`: name → why no byte of that tensor is read."""

    family: str
    towers: tuple[Tower, ...]
    skipped: Mapping[str, str]
    caveats: tuple[str, ...]
