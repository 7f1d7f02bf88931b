"""What heads do, whatever basis they are written in: Gram matrices of their weights, and what follows from these.

With W the effective weights (the norm's gain and, for LayerNorm, its centring included) a layer's heads are

    G_Q = Q·Qᵀ    G_K = K·Kᵀ    C = Q·Kᵀ    G_V = V·Vᵀ    G_O = Oᵀ·O        (head by head, h × h each)

which no orthogonal map of the residual stream and no folding of a norm changes. Latent attention has two more spaces
that may be turned, the latents that its queries, and its keys and values, are made of (the gains of the norms in front
of these are included): there G_Q is of rows that read the one, or the residual stream, G_K and G_V of rows that read
the other. The rows that its rotary embedding turns are others, and have Gram matrices of their own: those of a query
head read what its queries read, the one key of all heads reads the residual stream, and where these are not the same
there is no C. From them

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfp.architecture import HeadRows, LayerHeads, Projection, Role, Rotary
from llmfp.column_runs import runs_of
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
class Turned:
    """Gram matrices, float64, of the rows of one layer's heads that its rotary embedding turns, and how it does.

    q, k, qk  [heads, h, h], [key heads, h, h] and [heads, h, h]; qk None where q and k read different spaces
    inputs    coordinates that q and k read
    """

    q: Float64
    k: Float64
    qk: Float64 | None
    inputs: tuple[int, int]
    rotary: Rotary


@dataclass(frozen=True, slots=True)
class Grams:
    """Gram matrices of one layer's heads, float64, as above: q and o [heads, h, h], k and v [kv heads, h, h].

    v, o None where they do not tell heads apart; turned None without a rotary embedding
    """

    q: Float64
    k: Float64
    v: Float64 | None
    o: Float64 | None
    turned: Turned | None


def circuits(grams: Grams) -> Circuits | None:
    """What is kept of a layer; None where a weight is not finite, or no head does anything."""
    group = len(grams.q) // len(grams.k)
    qk_square = np.array([np.vdot(q, grams.k[head // group]) for head, q in enumerate(grams.q)])  # tr(G_Q·G_K)
    ov_square = None
    if grams.v is not None and grams.o is not None:
        ov_square = np.array([np.vdot(o, grams.v[head // group]) for head, o in enumerate(grams.o)])
    turned = () if grams.turned is None else (grams.turned.q, grams.turned.k)
    for numbers in (qk_square, ov_square, *turned):
        if numbers is not None and not np.isfinite(numbers).all():
            return None
    if not qk_square.any():
        return None
    average = heads = qk_spectrum = ov_spectrum = None
    if grams.turned is not None:
        average, heads = _rotary_coherence(grams.turned, np.sqrt(qk_square))
    else:
        qk_spectrum = _halves(spectra(grams.q, grams.k.repeat(group, axis=0)))
        if grams.v is not None and grams.o is not None:
            ov_spectrum = _halves(spectra(grams.v.repeat(group, axis=0), grams.o))
    with np.errstate(divide="ignore"):  # a head that does nothing
        qk_norm = (0.5 * np.log(qk_square)).tobytes()
        ov_norm = None if ov_square is None else (0.5 * np.log(ov_square)).tobytes()
    return Circuits(qk_norm, ov_norm, average, heads, qk_spectrum, ov_spectrum)


def _rotary_coherence(turned: Turned, norms: Float64) -> tuple[bytes, bytes]:
    """The layer's average over the heads that do something, and every head's sketch; a few heads at a time."""
    group = len(turned.q) // len(turned.k)
    acting = norms > NEGLIGIBLE * np.median(norms)
    total, sketches = np.zeros(0), []
    for first in range(0, len(norms), _HEADS_AT_A_TIME):
        heads = np.arange(first, min(first + _HEADS_AT_A_TIME, len(norms)))
        qk = None if turned.qk is None else turned.qk[heads]
        entries = coherence(turned.q[heads], turned.k[heads // group], qk, turned.inputs, turned.rotary)
        share = entries[acting[heads]].sum(axis=0)
        total = share if first == 0 else total + share
        sketches.append(sketch(entries))
    return _halves(total / np.count_nonzero(acting)), _halves(np.concatenate(sketches))


def _halves(values: Float64) -> bytes:
    return values.astype(np.float16).tobytes()


def coherence(q: Float64, k: Float64, qk: Float64 | None, inputs: tuple[int, int], rotary: Rotary) -> Float64:
    """Float64[heads, entries]: how much the rotary pairs of every head have in common.

    q, k, qk  [heads, h, h], for every query head the Gram matrices of itself, of its key head, and of both; without qk
              there are no entries of both
    inputs    how many coordinates queries and keys read

    The only maps inside a head that commute with every rotation of a rotary embedding of distinct frequencies turn and
    scale each pair: with the pair's rows as one complex row q_i = w_i + i·w_{i+P}, they multiply q_i by a complex
    number, and k_i by the inverse of its conjugate. With B_ij = (|⟨q_i, q_j⟩|² + |⟨q_i, q̄_j⟩|²) / 2, the squared norm
    of the 2 × 2 block of pairs i and j, the entries

        |⟨q_i, q_j⟩|² / 2√(B_ii·B_jj)  (i < j)     |⟨q_i, q̄_j⟩|² / 2√(B_ii·B_jj)  (i ≤ j)     likewise for K
        B^QK_ij / √(B^Q_ii·B^K_jj)     (all i, j)

    do not change, nor under an orthogonal map of the space that they read or the folding of a norm. Where all heads of
    a layer share one key, as in latent attention, that key is multiplied but once, and so are all heads' q_i by one
    number: of a complex number per head and pair one per pair is left. The entries do not change either where every
    head has its own; what heads have in common beyond that, the ratios of their q_i, is not used.

    Given as log(x + ½/d): two random rows of d inputs have x near 1/d. Pairs are in the order of their frequency, so
    that two models' entries mean the same. Checked against loops over complex rows, and by applying each of those maps.
    """
    order = _pair_order(rotary)
    pairs = rotary.pairs
    above, from_diagonal = np.triu_indices(pairs, 1), np.triu_indices(pairs)
    parts, diagonals = [], []
    for gram, size in zip((q, k), inputs, strict=True):
        same, conjugate = _blocks(gram[:, order][:, :, order], pairs)
        diagonal = np.einsum("hii->hi", same + conjugate) / 2
        scale = 2 * np.sqrt(diagonal[:, :, None] * diagonal[:, None, :])
        parts.append(np.log(_ratio(same, scale)[:, *above] + 0.5 / size))
        parts.append(np.log(_ratio(conjugate, scale)[:, *from_diagonal] + 0.5 / size))
        diagonals.append(diagonal)
    if qk is not None:
        same, conjugate = _blocks(qk[:, order][:, :, order], pairs)
        scale = np.sqrt(diagonals[0][:, :, None] * diagonals[1][:, None, :])
        parts.append(np.log(_ratio((same + conjugate) / 2, scale).reshape(len(qk), -1) + 0.5 / inputs[0]))
    return np.concatenate(parts, axis=1)


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

    Where heads run along the stored rows, a part of a head is multiplied when all its rows have come: from the step's
    own buffer, or, where steps cut it, from a float32 copy of it. Where they run along the stored columns, each unit of
    rows adds its share. C needs a query head and its key head together, so what K is stored as is kept until the layer
    is done, and whoever brings Q waits for it, unless both lie side by side in the same rows, or there is no C.
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
        self._parts = {rows: _Part(rows, heads.projections[rows.role]) for rows in heads.parts}
        self._cross = None if heads.crossed is None else _Cross(*heads.crossed)
        self._kept: list[tuple[int, Chunk]] = []
        self._cut: dict[tuple[HeadRows, int], _CutHead] = {}

    def keep(self, row: int, chunk: Chunk) -> None:
        """Takes a step of K, in a buffer that stays, for Q to come."""
        with self._lock:
            self._kept.append((row, chunk))

    def add(self, role: Role, row: int, position: int, chunks: Mapping[Role, Chunk]) -> bool:
        """Takes a step's rows, from `row` of the projection on; True for the call that completes the layer.

        position  the step's number among those of its projection
        chunks    by role, all that is stored side by side in these rows; for Q, if K is not, all of K is here
        """
        if self.heads.projections[role].residual_is_stored_rows:
            self._add_columns(role, row, position, chunks)
        else:
            self._add_rows(role, row, chunks[role])
        with self._lock:
            self._steps_left[role] -= 1
            if self._cross is not None and self._steps_left[self._cross.keys.role] == 0:
                self._keys_are_here.set()
            return not any(self._steps_left.values())

    def finish(self) -> Grams:
        """The layer's Gram matrices, centred where a LayerNorm takes the mean of the residual stream away."""
        self._kept.clear()
        grams = {rows: part.gram() for rows, part in self._parts.items()}
        heads, turned = self.heads, None
        if heads.turned is not None and heads.rotary is not None:
            q, k = heads.turned
            inputs = heads.projections[q.role].view.inputs, heads.projections[k.role].view.inputs
            turned = Turned(grams[q], grams[k], self._crossed(), inputs, heads.rotary)
        v, o = (None if rows is None else grams[rows] for rows in (heads.v, heads.o))
        return Grams(grams[heads.q], grams[heads.k], v, o, turned)

    def _crossed(self) -> Float64 | None:
        if self._cross is None:
            return None
        q, k = self._parts[self._cross.queries], self._parts[self._cross.keys]
        if not q.centred:
            return self._cross.products
        sums = k.sums.repeat(self._cross.group, axis=0)
        return self._cross.products - q.sums[:, :, None] * sums[:, None, :] / q.inputs

    def _add_rows(self, role: Role, row: int, chunk: Chunk) -> None:
        for rows, part in self._parts.items():
            if rows.role is not role:
                continue
            keys: tuple[int, Float32] | None = None
            for head in range(row // rows.stride, -(-(row + chunk.rows) // rows.stride)):
                values = self._whole_head(rows, head, row, chunk)
                if values is None:
                    continue
                if self.heads.projections[role].centred:
                    values = self._centre(values)
                part.products[head] = _product(values, values)
                if self._cross is not None and rows == self._cross.queries:
                    key = head // self._cross.group
                    if keys is None or keys[0] != key:
                        at = self._cross.keys
                        keys = key, self._key_rows(at.role, key * at.stride + at.first, at.size)
                    self._cross.products[head] = _product(values, keys[1])

    def _whole_head(self, rows: HeadRows, head: int, row: int, chunk: Chunk) -> Float32 | None:
        """All rows of a part of a head, [size, inputs]; None while some are still to come, or where none are here."""
        start = head * rows.stride + rows.first
        first, stop = max(row, start), min(row + chunk.rows, start + rows.size)
        if stop <= first:
            return None
        if stop - first == rows.size:
            return self._expand(chunk, first - row, rows.size)
        with self._lock:
            cut = self._cut.setdefault((rows, head), _CutHead(self._empty(rows.size, chunk.cols, chunk)))
        self._expand(chunk, first - row, stop - first, cut.values[first - start : stop - start])
        with self._lock:
            cut.rows += stop - first
            return self._cut.pop((rows, head)).values if cut.rows == rows.size else None

    def _add_columns(self, role: Role, row: int, position: int, chunks: Mapping[Role, Chunk]) -> None:
        chunk, cross = chunks[role], self._cross
        shares: dict[HeadRows, list[_Share]] = {rows: [] for rows in self._parts if rows.role is role}
        for first in range(0, chunk.rows, chunk.unit_rows):
            count = min(chunk.unit_rows, chunk.rows - first)
            values = self._expand(chunk, first, count)
            for rows, mine in shares.items():
                heads, crossed, sums = self._by_head(values, rows), None, None
                if cross is not None and rows == cross.queries:
                    beside = chunks.get(at := cross.keys.role)
                    keys = self._expand(beside, first, count) if beside else self._key_rows(at, row + first, count)
                    crossed = self._head_products(heads, self._by_head(keys, cross.keys))
                if self._parts[rows].centred:
                    sums = self._by_head(self._sum_rows(values), rows)[:, :, 0]
                mine.append((self._head_products(heads, heads), sums, crossed))
        with self._lock:
            for rows, mine in shares.items():
                part = self._parts[rows]
                for products, sums, crossed in part.in_order(position, mine):
                    part.products += products
                    if sums is not None:
                        part.sums += sums
                    if cross is not None and crossed is not None:
                        cross.products += crossed

    def _key_rows(self, role: Role, first: int, rows: int) -> Float32:
        """Stored rows [first, first + rows) of K's projection, expanded and, where heads run along them, centred."""
        k = self.heads.projections[role]
        values = self._empty(rows, k.view.all_cols, self._kept[0][1])
        for start, chunk in self._kept:
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

    def _centre(self, values: Float32) -> Float32:
        """Rows less their means."""
        centred: Float32 = values - values.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        return centred

    def _sum_rows(self, values: Float32) -> Float64:
        total: Float64 = values.sum(axis=0, dtype=np.float64, keepdims=True)
        return total

    def _by_head(self, values: NDArray[Any], rows: HeadRows) -> NDArray[Any]:
        return _by_head(values, rows)

    def _head_products(self, x: Float32, y: Float32) -> Float32:
        return _head_products(x, y)

    def _expand(self, chunk: Chunk, first: int, rows: int, out: Float32 | None = None) -> Float32:
        """Rows of a chunk as float32, times its weights."""
        out = self._empty(rows, chunk.cols, chunk) if out is None else out
        if chunk.coding is not None and chunk.coding.packing == "down" and (before := first % 32):
            out[:] = self._expand(chunk, first - before, before + rows)[before:]  # codes that come 32 rows at a time
            return out
        runs = runs_of(rows_of(chunk, first, rows))
        if len(runs) == 1:
            self._expand_into(runs[0], out)
            return out
        for run, part in enumerate(runs):
            values = self._empty(rows, part.cols, chunk)
            self._expand_into(part, values)
            out[:, run * part.cols : (run + 1) * part.cols] = values
        return out

    def _expand_into(self, part: Chunk, out: Float32) -> None:
        self._backend.expand(part, out.data.cast("B"))


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
    """One part's products: a Gram matrix per head, and, where stored columns are centred, the sum of each."""

    def __init__(self, rows: HeadRows, projection: Projection) -> None:
        self.inputs = projection.residual_size or 0
        self.products = np.zeros((rows.heads, rows.size, rows.size))
        self.centred = projection.centred and projection.residual_is_stored_rows
        self.sums = np.zeros((rows.heads, rows.size))
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
        return self.products - self.sums[:, :, None] * self.sums[:, None, :] / self.inputs


class _Cross:
    """Products of query heads with their key heads, [query heads, h, h]."""

    def __init__(self, queries: HeadRows, keys: HeadRows) -> None:
        self.queries, self.keys = queries, keys
        self.group = queries.heads // keys.heads
        self.products = np.zeros((queries.heads, queries.size, keys.size))


_Share = tuple[Float32, Float64 | None, Float32 | None]
"""What a unit of rows adds: products per head, sums of columns where these are centred, and for Q products with K."""


@dataclass(slots=True)
class _CutHead:
    """A head whose rows come in several steps."""

    values: Float32
    rows: int = 0


@np.errstate(over="ignore", invalid="ignore")  # a layer whose products are not finite is said to have no circuits
def _product(x: Float32, y: Float32) -> Float64:
    """x·yᵀ over the columns, float64 across blocks."""
    total = np.zeros((len(x), len(y)))
    for start in range(0, x.shape[1], BLOCK):
        total += x[:, start : start + BLOCK] @ y[:, start : start + BLOCK].T
    return total


def _by_head(values: NDArray[Any], rows: HeadRows) -> NDArray[Any]:
    """[heads, size, len(values)]: a part's columns of stored rows."""
    stored = values.reshape(len(values), rows.heads, rows.stride)
    return stored[:, :, rows.first : rows.first + rows.size].transpose(1, 2, 0)


@np.errstate(over="ignore", invalid="ignore")
def _head_products(x: Float32, y: Float32) -> Float32:
    """Float32[heads of x, h, h]: x·yᵀ of each head of x and the head of y that it shares."""
    group = len(x) // len(y)
    products = np.empty((len(x), x.shape[1], y.shape[1]), np.float32)
    for head, each in enumerate(x):
        np.matmul(each, y[head // group].T, out=products[head])
    return products
