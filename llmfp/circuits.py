"""What heads do, whatever basis they are written in: Gram matrices of their weights, and what follows from these.

With W the effective weights (the norm's gain and, for LayerNorm, its centring included) a layer's heads are

    G_Q = Q·Qᵀ    G_K = K·Kᵀ    C = Q·Kᵀ    G_V = V·Vᵀ    G_O = Oᵀ·O        (head by head, h × h each)

which no orthogonal map of the residual stream and no folding of a norm changes. From them

    circuit norms       ½·log tr(G_Q·G_K) = log ‖QᵀK‖, ½·log tr(G_V·G_O) = log ‖O·V‖
    rotary coherence    what is left of G_Q, G_K and C by the one freedom inside a rotary head, a rotation and a scale
                        per rotary pair (`coherence`)
    circuit spectra     eigenvalues of G_Q·G_K and G_V·G_O, for heads without rotary embedding (`spectra`)

`LayerGrams` gathers the Gram matrices of one layer while its weights stream by: each stored byte is expanded to float32
a head, or a unit of rows, at a time. Products are BLAS's in float32 over at most BLOCK terms, and float64 over those.
Whatever order the steps arrive in and however they are cut, the same sums are added in the same order.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmfp.architecture import LayerHeads, Role, Rotary
from llmfp.kernels import Backend
from llmfp.marginals import Buffer, Chunk

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

BLOCK = 4096
"""Terms of a product that are summed in float32."""
SKETCH = 256
"""Dimensions that a head's coherence is projected to."""
_HEADS_AT_A_TIME = 8
NEGLIGIBLE = 1e-3
"""Of the median norm ‖QᵀK‖ of a layer's heads: a head below it does nothing and is left out of the layer's average."""


@dataclass(frozen=True, slots=True)
class Circuits:
    """What is kept of one layer's heads; buffers, so that fingerprints compare.

    qk_norm, ov_norm          float64[heads], log Frobenius norms; ov_norm None where V and O do not tell heads apart
    coherence                 float16[entries], mean over the heads that do something; None without rotary embedding
    head_coherence            float16[heads, SKETCH], every head's, projected; None without rotary embedding
    qk_spectrum, ov_spectrum  float16[heads, size], log eigenvalues, descending; None with rotary embedding
    """

    qk_norm: Buffer
    ov_norm: Buffer | None
    coherence: Buffer | None
    head_coherence: Buffer | None
    qk_spectrum: Buffer | None
    ov_spectrum: Buffer | None


@dataclass(frozen=True, slots=True)
class Grams:
    """Gram matrices of one layer's heads, float64, as above: q, qk and o [heads, h, h], k and v [kv heads, h, h]."""

    q: Float64
    k: Float64
    qk: Float64
    v: Float64 | None
    o: Float64 | None


def circuits(grams: Grams, hidden_size: int, rotary: Rotary | None) -> Circuits | None:
    """What is kept of a layer; None where a weight is not finite, or no head does anything."""
    group = len(grams.q) // len(grams.k)
    qk_square = np.array([np.vdot(q, grams.k[head // group]) for head, q in enumerate(grams.q)])  # tr(G_Q·G_K)
    ov_square = None
    if grams.v is not None and grams.o is not None:
        ov_square = np.array([np.vdot(o, grams.v[head // group]) for head, o in enumerate(grams.o)])
    for square in (qk_square, ov_square):
        if square is not None and not np.isfinite(square).all():
            return None
    if not qk_square.any():
        return None
    average = heads = qk_spectrum = ov_spectrum = None
    if rotary is not None:
        average, heads = _rotary_coherence(grams, np.sqrt(qk_square), hidden_size, rotary)
    else:
        qk_spectrum = _halves(spectra(grams.q, grams.k.repeat(group, axis=0)))
        if grams.v is not None and grams.o is not None:
            ov_spectrum = _halves(spectra(grams.v.repeat(group, axis=0), grams.o))
    with np.errstate(divide="ignore"):  # a head that does nothing
        qk_norm = (0.5 * np.log(qk_square)).tobytes()
        ov_norm = None if ov_square is None else (0.5 * np.log(ov_square)).tobytes()
    return Circuits(qk_norm, ov_norm, average, heads, qk_spectrum, ov_spectrum)


def _rotary_coherence(grams: Grams, norms: Float64, hidden_size: int, rotary: Rotary) -> tuple[bytes, bytes]:
    """The layer's average over the heads that do something, and every head's sketch; a few heads at a time."""
    group = len(grams.q) // len(grams.k)
    acting = norms > NEGLIGIBLE * np.median(norms)
    total, sketches = np.zeros(0), []
    for first in range(0, len(norms), _HEADS_AT_A_TIME):
        heads = np.arange(first, min(first + _HEADS_AT_A_TIME, len(norms)))
        entries = coherence(grams.q[heads], grams.k[heads // group], grams.qk[heads], hidden_size, rotary)
        share = entries[acting[heads]].sum(axis=0)
        total = share if first == 0 else total + share
        sketches.append(sketch(entries))
    return _halves(total / np.count_nonzero(acting)), _halves(np.concatenate(sketches))


def _halves(values: Float64) -> bytes:
    return values.astype(np.float16).tobytes()


def coherence(q: Float64, k: Float64, qk: Float64, hidden_size: int, rotary: Rotary) -> Float64:
    """Float64[heads, entries]: how much the rotary pairs of every head have in common.

    q, k, qk  [heads, h, h], for every query head the Gram matrices of itself, of its key head, and of both

    The only maps inside a head that commute with every rotation of a rotary embedding of distinct frequencies turn and
    scale each pair: with the pair's rows as one complex row q_i = w_i + i·w_{i+P}, they multiply q_i by a complex
    number, and k_i by the inverse of its conjugate. With B_ij = (|⟨q_i, q_j⟩|² + |⟨q_i, q̄_j⟩|²) / 2, the squared norm
    of the 2 × 2 block of pairs i and j, the entries

        |⟨q_i, q_j⟩|² / 2√(B_ii·B_jj)  (i < j)     |⟨q_i, q̄_j⟩|² / 2√(B_ii·B_jj)  (i ≤ j)     likewise for K
        B^QK_ij / √(B^Q_ii·B^K_jj)     (all i, j)

    do not change, nor under an orthogonal map of the residual stream or the folding of a norm. Given as log(x + ½/d):
    two random rows of d inputs have x near 1/d. Pairs are in the order of their frequency, so that two models'
    entries mean the same. Checked against loops over complex rows, and by applying each of those maps.
    """
    order = _pair_order(rotary)
    q, k, qk = (each[:, order][:, :, order] for each in (q, k, qk))
    pairs = rotary.pairs
    above, from_diagonal = np.triu_indices(pairs, 1), np.triu_indices(pairs)
    parts, diagonals = [], []
    for gram in (q, k):
        same, conjugate = _blocks(gram, pairs)
        diagonal = np.einsum("hii->hi", same + conjugate) / 2
        scale = 2 * np.sqrt(diagonal[:, :, None] * diagonal[:, None, :])
        parts.append(_ratio(same, scale)[:, *above])
        parts.append(_ratio(conjugate, scale)[:, *from_diagonal])
        diagonals.append(diagonal)
    same, conjugate = _blocks(qk, pairs)
    scale = np.sqrt(diagonals[0][:, :, None] * diagonals[1][:, None, :])
    parts.append(_ratio((same + conjugate) / 2, scale).reshape(len(qk), -1))
    logarithms: Float64 = np.log(np.concatenate(parts, axis=1) + 0.5 / hidden_size)
    return logarithms


def spectra(a: Float64, b: Float64) -> Float64:
    """Float64[heads, h]: log eigenvalues of the products of positive matrices, descending, over their mean, floored.

    Eigenvalues of a·b are those of Lᵀ·b·L with a = L·Lᵀ: squared singular values of the circuit.
    """
    size = a.shape[1]
    ridge = 1e-12 * np.einsum("hii->h", a)[:, None, None] / size * np.eye(size)
    tiny = np.finfo(np.float64).tiny
    lower = np.linalg.cholesky(a + ridge + tiny * np.eye(size))
    eigenvalues: Float64 = np.linalg.eigvalsh(lower.swapaxes(1, 2) @ b @ lower)[:, ::-1].astype(np.float64)
    mean = eigenvalues.mean(axis=1, keepdims=True)
    relative = _ratio(eigenvalues, np.broadcast_to(mean, eigenvalues.shape))
    logarithms: Float64 = np.log(np.maximum(relative, 1e-4))
    return logarithms


def sketch(entries: Float64) -> Float64:
    """Float64[heads, SKETCH]: a fixed random projection of what each head's entries differ by from their mean.

    Every entry is added to, or subtracted from, one of SKETCH sums, drawn from SHAKE-256: inner products are kept
    in expectation (Weinberger et al. 2009, feature hashing), and the draw is the same on every machine.
    """
    count = entries.shape[1]
    drawn = np.frombuffer(hashlib.shake_256(b"llmfp head coherence 1").digest(2 * count), np.uint8)
    place, sign = drawn[:count].astype(np.intp), np.where(drawn[count:] & 1, 1.0, -1.0)
    centred = (entries - entries.mean(axis=1, keepdims=True)) * sign
    return np.stack([np.bincount(place, weights=row, minlength=SKETCH) for row in centred])


def _pair_order(rotary: Rotary) -> NDArray[np.intp]:
    """The rows of a head that are turned: first members of all pairs, then second members."""
    first = np.arange(rotary.pairs)
    pairs = (2 * first, 2 * first + 1) if rotary.interleaved else (first, first + rotary.pairs)
    return np.concatenate(pairs)


def _blocks(gram: Float64, pairs: int) -> tuple[Float64, Float64]:
    """|⟨x_i, y_j⟩|² and |⟨x_i, ȳ_j⟩|² of complex rows, from the products of their parts, [heads, 2P, 2P]."""
    a, b, c, d = gram[:, :pairs, :pairs], gram[:, :pairs, pairs:], gram[:, pairs:, :pairs], gram[:, pairs:, pairs:]
    return (a + d) ** 2 + (c - b) ** 2, (a - d) ** 2 + (c + b) ** 2


def _ratio(x: Float64, y: Float64) -> Float64:
    """x / y, and 0 where y is: a pair without weights has nothing in common with another."""
    ratio: Float64 = np.divide(x, y, out=np.zeros_like(x), where=y > 0)
    return ratio


class LayerGrams:
    """Gathers the Gram matrices of one layer. Any thread may add any step; `add` says which call was the last.

    Where heads run along the stored rows, a head's rows are multiplied when all of them have come: from the step's own
    buffer, or, where steps cut a head, from a float32 copy of that head. Where they run along the stored columns, each
    unit of rows adds its share. C needs a query head and its key head together, so what K is stored as is kept until
    the layer is done, and whoever brings Q waits for it, unless both lie side by side in the same rows.
    """

    def __init__(
        self, heads: LayerHeads, backend: Backend, steps: Mapping[Role, int], keys_are_here: threading.Event
    ) -> None:
        """steps: how many hold rows of each projection; keys_are_here: set when all of K has come."""
        self.heads = heads
        self._keys_are_here = keys_are_here
        self._backend = backend
        self._lock = threading.Lock()
        self._steps_left = dict(steps)
        self._parts = {role: _Part(heads, role) for role in heads.projections}
        self._qk = np.zeros((heads.heads, heads.size, heads.size))
        self._keys: list[tuple[int, Chunk]] = []
        self._cut: dict[tuple[Role, int], _CutHead] = {}

    def keep(self, row: int, chunk: Chunk) -> None:
        """Takes a step of K, in a buffer that stays, for Q to come."""
        with self._lock:
            self._keys.append((row, chunk))

    def add(self, role: Role, row: int, position: int, chunk: Chunk, keys: Chunk | None = None) -> bool:
        """Takes a step's rows, from `row` of the projection on; True for the call that completes the layer.

        position  the step's number among those of its projection
        keys      K's part of the same rows, where they are stored side by side with Q's; else all of K is here
        """
        if self.heads.projections[role].residual_is_stored_rows:
            self._add_columns(role, row, position, chunk, keys)
        else:
            self._add_rows(role, row, chunk)
        with self._lock:
            self._steps_left[role] -= 1
            if self._steps_left[Role.K] == 0:
                self._keys_are_here.set()
            return not any(self._steps_left.values())

    def finish(self) -> Grams:
        """The layer's Gram matrices, centred where a LayerNorm takes the mean of the residual stream away."""
        self._keys.clear()
        q, k = self._parts[Role.Q], self._parts[Role.K]
        qk = self._qk
        if q.centred:
            keys = k.sums.repeat(self.heads.heads // self.heads.kv_heads, axis=0)
            qk = qk - q.sums[:, :, None] * keys[:, None, :] / self.heads.projections[Role.Q].view.inputs
        grams = {role: part.gram() for role, part in self._parts.items()}
        return Grams(grams[Role.Q], grams[Role.K], qk, grams.get(Role.V), grams.get(Role.O))

    def _add_rows(self, role: Role, row: int, chunk: Chunk) -> None:
        size = self._parts[role].size
        keys: tuple[int, Float32] | None = None
        group = self.heads.heads // self.heads.kv_heads
        for head in range(row // size, -(-(row + chunk.rows) // size)):
            values = self._whole_head(role, head, row, chunk)
            if values is None:
                continue
            if self.heads.projections[role].centred:
                values = self._centre(values)
            self._parts[role].products[head] = _product(values, values)
            if role is Role.Q:
                kv_head = head // group
                if keys is None or keys[0] != kv_head:
                    keys = kv_head, self._key_rows(kv_head * size, size)
                self._qk[head] = _product(values, keys[1])

    def _whole_head(self, role: Role, head: int, row: int, chunk: Chunk) -> Float32 | None:
        """All rows of a head, [size, inputs]; None while some are still to come."""
        size = self._parts[role].size
        first, stop = max(row, head * size), min(row + chunk.rows, (head + 1) * size)
        if stop - first == size:
            return self._expand(chunk, first - row, size)
        with self._lock:
            cut = self._cut.setdefault((role, head), _CutHead(self._empty(size, chunk.cols, chunk)))
        at = first - head * size
        self._expand(chunk, first - row, stop - first, cut.values[at : at + stop - first])
        with self._lock:
            cut.rows += stop - first
            return self._cut.pop((role, head)).values if cut.rows == size else None

    def _add_columns(self, role: Role, row: int, position: int, chunk: Chunk, keys: Chunk | None) -> None:
        part = self._parts[role]
        shares = []
        for first in range(0, chunk.rows, chunk.unit_rows):
            rows = min(chunk.unit_rows, chunk.rows - first)
            values = self._expand(chunk, first, rows)
            products, cross = self._head_products(values, values, part.heads, part.heads), None
            if role is Role.Q:
                beside = self._key_rows(row + first, rows) if keys is None else self._expand(keys, first, rows)
                cross = self._head_products(values, beside, part.heads, self.heads.kv_heads)
            sums = self._sum_rows(values).reshape(part.heads, -1) if part.centred else None
            shares.append((products, sums, cross))
        with self._lock:
            for products, sums, cross in part.in_order(position, shares):
                part.products += products
                if sums is not None:
                    part.sums += sums
                if cross is not None:
                    self._qk += cross

    def _key_rows(self, first: int, rows: int) -> Float32:
        """Stored rows [first, first + rows) of K, expanded and, where heads run along them, centred."""
        k = self.heads.projections[Role.K]
        values = self._empty(rows, k.view.cols, self._keys[0][1])
        for start, chunk in self._keys:
            begin, stop = max(first, start), min(first + rows, start + chunk.rows)
            if begin < stop:
                self._expand(chunk, begin - start, stop - begin, values[begin - first : stop - first])
        if k.centred and not k.residual_is_stored_rows:
            values = self._centre(values)
        return values

    # What differs where matrices lie on a device (llmfp.device_circuits).

    def _empty(self, rows: int, cols: int, _like: Chunk) -> Float32:
        """Room for expanded rows, where the chunk's are expanded."""
        return np.empty((rows, cols), np.float32)

    def _expand(self, chunk: Chunk, first: int, rows: int, out: Float32 | None = None) -> Float32:
        """Rows of a chunk as float32, times its weights."""
        out = self._empty(rows, chunk.cols, chunk) if out is None else out
        self._backend.expand(rows_of(chunk, first, rows), out.data.cast("B"))
        return out

    def _centre(self, values: Float32) -> Float32:
        """Rows less their means."""
        centred: Float32 = values - values.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        return centred

    def _sum_rows(self, values: Float32) -> Float64:
        total: Float64 = values.sum(axis=0, dtype=np.float64)
        return total

    def _head_products(self, x: Float32, y: Float32, heads_x: int, heads_y: int) -> Float32:
        """Float32[heads of x, h, h]: xᵀ·y over the rows for each head of x and the head of y that it shares."""
        by_head_x = x.reshape(len(x), heads_x, -1).transpose(1, 2, 0)
        by_head_y = y.reshape(len(y), heads_y, -1).transpose(1, 0, 2)
        group = heads_x // heads_y
        return np.stack([by_head_x[head] @ by_head_y[head // group] for head in range(heads_x)])


def layer_grams(
    heads: LayerHeads, backend: Backend, steps: Mapping[Role, int], keys_are_here: threading.Event
) -> LayerGrams:
    """What gathers one layer's Gram matrices, where the back end's chunks lie."""
    if backend.takes_tensors:
        from llmfp.device_circuits import DeviceGrams  # imports torch when it works

        return DeviceGrams(heads, backend, steps, keys_are_here)
    return LayerGrams(heads, backend, steps, keys_are_here)


def rows_of(chunk: Chunk, first: int, rows: int) -> Chunk:
    """Some of a chunk's rows, as a chunk."""
    weight = chunk.row_weight
    return replace(
        chunk,
        rows=rows,
        offset_bytes=chunk.offset_bytes + first_stored_row(chunk, first) * chunk.row_stride_bytes,
        first_row=chunk.first_row + first,
        row_weight=None if weight is None else memoryview(weight).cast("B")[4 * first : 4 * (first + rows)],
    )


def first_stored_row(chunk: Chunk, row: int) -> int:
    """Which stored row holds a chunk's row: itself, but codes that run down words have 32 rows in `bits` of them."""
    if chunk.coding is not None and chunk.coding.packing == "down":
        return row // 32 * chunk.coding.bits
    return row


class _Part:
    """One projection's products: a Gram matrix per head, and, where stored columns are centred, the sum of each."""

    def __init__(self, heads: LayerHeads, role: Role) -> None:
        self.heads = heads.heads if role in (Role.Q, Role.O) else heads.kv_heads
        self.size = heads.size if role in (Role.Q, Role.K) else heads.value_size or 0
        projection = heads.projections[role]
        self._residual_size = projection.residual_size or 0
        self.products = np.zeros((self.heads, self.size, self.size))
        self.centred = projection.centred and projection.residual_is_stored_rows
        self.sums = np.zeros((self.heads, self.size))
        self._next = 0
        self._waiting: dict[int, Sequence[_Share]] = {}

    def in_order(self, position: int, shares: Sequence[_Share]) -> Iterator[_Share]:
        """All shares whose turn has come."""
        self._waiting[position] = shares
        while (ready := self._waiting.pop(self._next, None)) is not None:
            yield from ready
            self._next += 1

    def gram(self) -> Float64:
        if not self.centred:
            return self.products
        return self.products - self.sums[:, :, None] * self.sums[:, None, :] / self._residual_size


_Share = tuple[Float32, Float64 | None, Float32 | None]
"""What a unit of rows adds: products per head, sums of columns where these are centred, and for Q products with K."""


@dataclass(slots=True)
class _CutHead:
    """A head whose rows come in several steps."""

    values: Float32
    rows: int = 0


def _product(x: Float32, y: Float32) -> Float64:
    """x·yᵀ over the columns, float64 across blocks."""
    total = np.zeros((len(x), len(y)))
    for start in range(0, x.shape[1], BLOCK):
        total += x[:, start : start + BLOCK] @ y[:, start : start + BLOCK].T
    return total
