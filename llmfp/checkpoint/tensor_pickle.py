"""Reads the pickle of a state dict without running it: no import, no call, no attribute, whatever the pickle asks for.

A pickle is a program for a small stack machine. `pickle.Unpickler` with a guarded find_class would stop calls, but its
C machine lets a short file allocate gigabytes (a memo index of 2^32) or overflow the C stack (hash of a nested tuple).
This machine is ours: it knows the 35 opcodes that torch.save has ever needed, looks global names up in a table of our
own (exact pairs, so nothing is traversed), puts plain records where objects would be, never hashes, compares or prints
what it built, does not recurse, and stops after `MAX_OPCODES`. Opcodes: Lib/pickletools.py, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_BYTES = 16 << 20
MAX_OPCODES = 2_000_000
"""torch.save needs about 40 opcodes and 200 bytes a tensor."""

STORAGES = {
    "torch.BFloat16Storage": "BF16", "torch.BoolStorage": "BOOL", "torch.ByteStorage": "U8", "torch.CharStorage": "I8",
    "torch.ComplexDoubleStorage": "C128", "torch.ComplexFloatStorage": "C64", "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.IntStorage": "I32", "torch.LongStorage": "I64",
    "torch.ShortStorage": "I16", "torch.storage.UntypedStorage": None,
}  # fmt: skip
"""The dtype of each storage class, by safetensors' names where it has one; None where each tensor brings its own."""

DTYPES = {
    "torch.bfloat16": "BF16", "torch.bool": "BOOL", "torch.complex128": "C128", "torch.complex64": "C64",
    "torch.float16": "F16", "torch.float32": "F32", "torch.float64": "F64", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0", "torch.int16": "I16", "torch.int32": "I32", "torch.int64": "I64",
    "torch.int8": "I8", "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64", "torch.uint8": "U8",
}  # fmt: skip


class PickleRefusedError(ValueError):
    """The pickle is malformed or asks for more than rebuilding tensors. One line, without the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """An admitted global, by name only."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A persistent id ('storage', class, key, location, numel): where bytes are, as the pickle claims."""

    dtype: str | None
    key: object
    numel: object


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor as the pickle claims it to be. Nothing is checked but the storage's type; units are elements."""

    storage: Storage
    offset: object
    size: object
    stride: object
    dtype: str | None
    metadata: object


@dataclass(frozen=True, slots=True, eq=False)
class Dict:
    """A dict or OrderedDict as pairs: keys are not hashed, since a pickle can choose integers that all collide."""

    items: list[tuple[object, object]] = field(default_factory=list)


def parse(data: bytes) -> object:
    """What the pickle describes, of Dict, list, tuple, Tensor, Storage, Global, str, int, float, bool and None.

    Raises PickleRefusedError, naming the global or the opcode. Memory: at most about 100 bytes per opcode.
    """
    return _Machine(data).run()


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        """The stacks under each mark, so that nothing can pop past one."""
        self._memo: list[object] = []

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            code = self._take(1)[0]
            if code == _STOP:
                return self._stop()
            step = _STEPS.get(code)
            if step is None:
                raise self._refused(f"opcode {_opcode_name(code)} is refused")
            step(self)
        raise self._refused(f"more than {MAX_OPCODES} opcodes")

    def _stop(self) -> object:
        result = self._pop()
        if self._stack or self._below or self._position != len(self._data):
            raise self._refused("something is left over")
        return result

    def _refused(self, problem: str) -> PickleRefusedError:
        return PickleRefusedError(f"{problem} (before byte {self._position} of the pickle)")

    def _take(self, nbytes: int) -> bytes:
        start = self._position
        self._position += nbytes
        if self._position > len(self._data):
            raise PickleRefusedError("the pickle is truncated")
        return self._data[start : self._position]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position)
        if end < 0:
            raise PickleRefusedError("the pickle is truncated")
        return self._text(self._take(end + 1 - self._position)[:-1])

    def _text(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._refused(f"text {data[:40]!r} is not UTF-8") from None

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise self._refused("nothing is left on the stack")
        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack:
            raise self._refused("nothing is left on the stack")
        return self._stack[-1]

    # --- what opcodes do ---------------------------------------------------------------------------------------------

    def protocol(self) -> None:
        if (version := self._take(1)[0]) not in range(2, 6):
            raise self._refused(f"protocol {version} is not supported")

    def frame(self) -> None:
        self._take(8)

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[object]:
        if not self._below:
            raise self._refused("no mark is left on the stack")
        items, self._stack = self._stack, self._below.pop()
        return items

    def long1(self) -> None:
        self._push(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def short_text(self) -> None:
        self._push(self._text(self._take(self._take(1)[0])))

    def long_text(self) -> None:
        self._push(self._text(self._take(int.from_bytes(self._take(4), "little"))))

    def memoize(self) -> None:
        self._memo.append(self._top())

    def put(self, width: int) -> None:
        """Picklers number the memo from 0 upwards; a list then serves, and no index can make it grow."""
        index = int.from_bytes(self._take(width), "little")
        if index > len(self._memo):
            raise self._refused(f"memo entry {index} comes after {len(self._memo)} entries")
        self._memo[index : index + 1] = [self._top()]

    def get(self, width: int) -> None:
        index = int.from_bytes(self._take(width), "little")
        if index >= len(self._memo):
            raise self._refused(f"memo entry {index} does not exist")
        self._push(self._memo[index])

    def append(self) -> None:
        self._extend([self._pop()])

    def appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise self._refused("items are appended to what is no list")
        target.extend(items)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, Dict) or len(items) % 2:
            raise self._refused("items are set on what is no dict")
        target.items.extend(zip(items[::2], items[1::2], strict=True))

    def tuple_of(self, count: int) -> None:
        if count > len(self._stack):
            raise self._refused("nothing is left on the stack")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def global_lines(self) -> None:
        self._global(self._line(), self._line())

    def global_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._refused("a global is named by what is no text")
        self._global(module, name)

    def instance(self) -> None:
        self.global_lines()
        raise self._refused("opcode INST is refused")

    def _global(self, module: str, name: str) -> None:
        if (module, name) not in _GLOBALS:
            raise self._refused(f"global {f'{module}.{name}'[:200]!r} is refused")
        self._push(Global(f"{module}.{name}"))

    def persistent_id(self) -> None:
        match self._pop():
            case ("storage", Global(name), key, _, numel) if name in STORAGES:
                self._push(Storage(STORAGES[name], key, numel))
            case _:
                raise self._refused("a persistent id does not describe a storage")

    def reduce(self) -> None:
        args, function = self._pop(), self._pop()
        build = _CALLS.get(function.name) if isinstance(function, Global) else None
        if build is None or not isinstance(function, Global):
            called = repr(function.name) if isinstance(function, Global) else "what is no global"
            raise self._refused(f"a call of {called} is refused")
        if not isinstance(args, tuple) or (built := build(args)) is None:
            raise self._refused(f"global {function.name!r} is called with unknown arguments")
        self._push(built)

    def build(self) -> None:
        """Attributes of an OrderedDict: `_metadata`, module versions. They are dropped."""
        self._pop()
        if not isinstance(self._top(), Dict):
            raise self._refused("opcode BUILD is refused on anything but an OrderedDict")


def _ordered_dict(args: tuple[object, ...]) -> Dict | None:
    return None if args else Dict()


def _tensor(args: tuple[object, ...]) -> Tensor | None:
    """_rebuild_tensor(storage, offset, size, stride), v2 with (…, requires_grad, hooks, metadata=None)."""
    match args:
        case (Storage() as storage, offset, size, stride) | (Storage() as storage, offset, size, stride, _, _):
            return Tensor(storage, offset, size, stride, storage.dtype, None)
        case (Storage() as storage, offset, size, stride, _, _, metadata):
            return Tensor(storage, offset, size, stride, storage.dtype, metadata)
    return None


def _tensor_v3(args: tuple[object, ...]) -> Tensor | None:
    """_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None)."""
    match args:
        case (Storage() as storage, offset, size, stride, _, _, Global(dtype), *metadata):
            if dtype in DTYPES and len(metadata) < 2:
                return Tensor(storage, offset, size, stride, DTYPES[dtype], metadata[0] if metadata else None)
    return None


def _parameter(args: tuple[object, ...]) -> Tensor | None:
    """_rebuild_parameter(data, requires_grad, hooks), _rebuild_parameter_with_state(…, state)."""
    return args[0] if len(args) in (3, 4) and isinstance(args[0], Tensor) else None


_CALLS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_GLOBALS = {tuple(name.rsplit(".", 1)) for name in (*_CALLS, *STORAGES, *DTYPES)}
"""(module, name) pairs that may be named at all."""

_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): lambda machine: machine._push(None),
    0x88: lambda machine: machine._push(True),
    0x89: lambda machine: machine._push(False),
    ord("K"): lambda machine: machine._push(machine._take(1)[0]),
    ord("M"): lambda machine: machine._push(int.from_bytes(machine._take(2), "little")),
    ord("J"): lambda machine: machine._push(int.from_bytes(machine._take(4), "little", signed=True)),
    0x8A: _Machine.long1,
    ord("G"): lambda machine: machine._push(struct.unpack(">d", machine._take(8))[0]),
    0x8C: _Machine.short_text,
    ord("X"): _Machine.long_text,
    ord("q"): lambda machine: machine.put(1),
    ord("r"): lambda machine: machine.put(4),
    0x94: _Machine.memoize,
    ord("h"): lambda machine: machine.get(1),
    ord("j"): lambda machine: machine.get(4),
    ord(")"): lambda machine: machine._push(()),
    0x85: lambda machine: machine.tuple_of(1),
    0x86: lambda machine: machine.tuple_of(2),
    0x87: lambda machine: machine.tuple_of(3),
    ord("t"): lambda machine: machine._push(tuple(machine.pop_mark())),
    ord("]"): lambda machine: machine._push([]),
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("}"): lambda machine: machine._push(Dict()),
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("c"): _Machine.global_lines,
    0x93: _Machine.global_stack,
    ord("i"): _Machine.instance,
    ord("Q"): _Machine.persistent_id,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
}


def _opcode_name(code: int) -> str:
    import pickletools

    return next((known.name for known in pickletools.opcodes if known.code == chr(code)), f"0x{code:02x}")
