"""The index: a row per fingerprint, in Parquet files that any number of writers add to without a server.

State is a set that only grows. A writer adds a file of rows under a name of its own; every row has an `entry` of its
own, drawn at random; a removal is an empty file named after the entry that it removes. So the index is the union of all
files, less what was removed, and neither the order nor the number of files matters: compaction writes the union into
one file, and only then deletes the files that it read. Killed at any moment it leaves rows twice, never none, and two
compactions at once do no harm. A reader that meets one looks again.

No clock, lock or rename over a living file is relied on, only that a file appears whole.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfp.registry.store import RegistryError, Store

if TYPE_CHECKING:
    import pyarrow as pa

INDEX, REMOVED = "index", "removed"
SUFFIX = ".parquet"
ROLES = ("q", "k", "v", "o")
KEY = ("repo", "revision")
_COMPACT = f"{INDEX}/compact-"
_MAX_TABLE_BYTES = 8 << 30
_MOST_ROUNDS = 100
_ROW_GROUP = 16_384


def arrow() -> Any:
    """pyarrow, which is an extra. Raises RegistryError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise RegistryError("the registry's index needs pyarrow", hint="pip install 'llmfp[registry]'") from None
    return pyarrow


def schema() -> pa.Schema:
    """The columns; docs/registry.md says what each one means."""
    pa = arrow()
    text, number, curve = pa.string(), pa.int32(), pa.list_(pa.float64())
    fields = [
        *(pa.field(name, text, nullable=False) for name in ("repo", "revision", "entry", "file", "sha256", "digest")),
        *(pa.field(name, text, nullable=False) for name in ("architecture", "tower", "kind")),
        pa.field("model_type", text),
        *(pa.field(name, number) for name in ("heads", "kv_heads", "head_dim")),
        *(pa.field(name, number, nullable=False) for name in ("layers", "hidden_size")),
        *(pa.field(f"std_{role}", curve, nullable=False) for role in ROLES),
        pa.field("rotary_pairs", number),
        pa.field("coherence", pa.list_(pa.float32())),
        pa.field("base_models", pa.list_(text), nullable=False),
        pa.field("base_model_relation", text),
        *(pa.field(name, text) for name in ("weights", "config", "stamp")),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("bytes_read", "bytes_total")),
        pa.field("added", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
    return pa.schema(fields, metadata={"llmfp.schema": "llmfp.registry/1"})


@dataclass(frozen=True, slots=True)
class Compaction:
    """How many files the index had, and how many rows it has."""

    files: int
    rows: int


class Index:
    """The rows of a registry at a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, all of them or none."""
        pa = arrow()
        try:
            table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema())
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise RegistryError(f"{self._store.where}: a row that no index can hold ({error})") from None
        self._write(f"{INDEX}/add-{uuid.uuid4().hex}{SUFFIX}", table)

    def remove(self, entries: Iterable[str]) -> None:
        for entry in entries:
            self._store.write(f"{REMOVED}/{entry}", b"")

    def removed(self) -> set[str]:
        """The entries that were ever removed."""
        return {name.rsplit("/", 1)[-1] for name in self._store.names(REMOVED)}

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows in the order of (repo, revision), one for each; columns as named, or all.

        Where two writers added the same key, the row with the lesser entry stands; where one added it again, the later
        row. Raises RegistryError for files that
        are no part of an index.
        """
        table = _one_for_each_key(self.read_all(columns))
        return table if columns is None else table.select(list(columns))

    def read_all(self, columns: Sequence[str] | None = None) -> pa.Table:
        """As `read`, in no order, with every row of a key that was added more than once, and always key and entry."""
        return _without(self._union(columns)[0], self.removed())

    def superseded(self) -> list[dict[str, str]]:
        """repo, revision and entry of the rows that `read` leaves out, whose key was added before."""
        rows = self.read_all([])
        kept = _one_for_each_key(rows)
        if kept.num_rows == rows.num_rows:
            return []
        standing = set(kept["entry"].to_pylist())
        return [row for row in rows.to_pylist() if row["entry"] not in standing]

    def compact(self) -> Compaction:
        """Puts all rows into one file, and only then deletes the files that they were in."""
        table, names = self._union(None)
        kept = _one_for_each_key(_without(table, self.removed()))
        if len(names) > 1 or kept.num_rows < table.num_rows or not all(name.startswith(_COMPACT) for name in names):
            self._write(f"{_COMPACT}{uuid.uuid4().hex}{SUFFIX}", kept)
            for name in names:
                self._store.delete(name)
        return Compaction(len(names), kept.num_rows)

    def files(self) -> int:
        """How many files a reader has to open."""
        return len(self._names())

    def _names(self) -> list[str]:
        return [name for name in self._store.names(INDEX) if name.endswith(SUFFIX)]

    def _union(self, columns: Sequence[str] | None) -> tuple[pa.Table, list[str]]:
        """All rows of all files, some twice, and the files' names.

        A file that is gone, or a compact one that was not there at first, means that a compaction went on: what was
        missed is in the new file.
        """
        pa = arrow()
        wanted = None if columns is None else list(dict.fromkeys((*KEY, "entry", "added", *columns)))
        tables: dict[str, Any] = {}
        names = self._names()
        for _ in range(_MOST_ROUNDS):
            vanished = False
            for name in names:
                if name not in tables:
                    table = self._read_file(name, wanted)
                    vanished = vanished or table is None
                    if table is not None:
                        tables[name] = table
            before, names = names, self._names()
            if not vanished and not {n for n in names if n.startswith(_COMPACT)} - set(before):
                break
        else:
            raise RegistryError(f"{self._store.where}: the index was compacted {_MOST_ROUNDS} times while it was read")
        empty = schema() if wanted is None else pa.schema([schema().field(name) for name in wanted])
        return pa.concat_tables([empty.empty_table(), *tables.values()]), list(tables)

    def _read_file(self, name: str, columns: list[str] | None) -> pa.Table | None:
        pa = arrow()
        where = f"{self._store.where}/{name}"
        wanted = schema() if columns is None else pa.schema([schema().field(each) for each in columns])
        try:
            # Mapped: files of an index never change, and reading σ of 100,000 rows takes a quarter less.
            with self._store.path(name) as path, pa.parquet.ParquetFile(path, memory_map=True) as file:
                groups = (file.metadata.row_group(n) for n in range(file.metadata.num_row_groups))
                if (nbytes := sum(group.total_byte_size for group in groups)) > _MAX_TABLE_BYTES:
                    raise RegistryError(f"{where}: {nbytes} bytes of rows are over the limit of {_MAX_TABLE_BYTES}")
                table = file.read(columns=wanted.names).select(wanted.names)
                return table if table.schema.equals(wanted) else table.cast(wanted)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            line = str(error).split("\n", 1)[0][:200]
            raise RegistryError(
                f"{where}: not a part of a registry's index ({line})",
                hint="move the file away; registry verify then says whether rows are missing",
            ) from None

    def _write(self, name: str, table: pa.Table) -> None:
        self._store.write(name, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file. σ do not compress, and reading them back at once is what the index is for."""
    curves = {"coherence.list.element", *(f"std_{role}.list.element" for role in ROLES)}
    out = io.BytesIO()
    arrow().parquet.write_table(
        table,
        out,
        row_group_size=_ROW_GROUP,
        use_dictionary=["architecture", "tower", "kind", "model_type", "base_model_relation"],
        compression={name: "NONE" if name in curves else "ZSTD" for name in _leaves(table)},
    )
    return out.getvalue()


def _leaves(table: pa.Table) -> list[str]:
    """The names of the stored columns: that of a list is of its elements."""
    pa = arrow()
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in table.schema]


def _without(table: pa.Table, removed: set[str]) -> pa.Table:
    if not removed:
        return table
    pa = arrow()
    gone = pa.compute.is_in(table["entry"], value_set=pa.array(sorted(removed), pa.string()))
    return table.filter(pa.compute.invert(gone))


def _one_for_each_key(table: pa.Table) -> pa.Table:
    if _is_ordered(table):
        return table
    pc = arrow().compute
    order = [*((name, "ascending") for name in (*KEY, "entry")), ("added", "descending")]
    table = table.take(pc.sort_indices(table, sort_keys=order))
    return table.filter(_differs_from_the_row_before(table))


def _is_ordered(table: pa.Table) -> bool:
    """Whether rows are in the order of their keys and no key is there twice, as compaction leaves them."""
    if table.num_rows < 2:
        return True
    pc = arrow().compute
    (repo, next_repo), (revision, next_revision) = (
        (table[name].slice(0, table.num_rows - 1), table[name].slice(1)) for name in KEY
    )
    within = pc.and_(pc.equal(repo, next_repo), pc.less(revision, next_revision))
    return bool(pc.all(pc.or_(pc.less(repo, next_repo), within)).as_py())


def _differs_from_the_row_before(table: pa.Table) -> Any:
    """bool [rows], True for the first."""
    pa = arrow()
    pc = pa.compute
    n = max(table.num_rows - 1, 0)
    changed = pc.or_(*(pc.not_equal(table[name].slice(1), table[name].slice(0, n)) for name in KEY))
    first = pa.array([True] * min(table.num_rows, 1), pa.bool_())
    return pa.chunked_array([first, *changed.chunks], pa.bool_())
