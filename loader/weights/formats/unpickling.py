"""A pickle -> plain containers, records and descriptions of tensors. No name in it is ever called.

Its own small machine rather than ``pickle.Unpickler`` with a filter: that one sets attributes on
whatever lies on its stack and allocates by a number that the file gives. What comes out is shallow,
and as large as the file: whoever walks it needs no bounds of his own.

Source of the opcodes: Python's ``pickletools``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Mapping

from loader.errors import FormatError, UnsupportedError
from loader.weights.formats.allowed import ALLOWED, DTYPES, STORAGES
from loader.weights.formats.records import Name, Record, StorageRef, TensorRef, is_count, make

_HIGHEST_PROTOCOL = 5
_MOST_VALUES = 1 << 26
_MOST_DEPTH = 100
_CONTAINERS = (Record, dict, list, tuple)  # of what may hold more of them; sets hold keys
_MOST_IN_KEY = 1000
_COPIES = 8  # how much larger than itself a pickle may be, read as a tree


_BROKEN = (
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
    struct.error,
)


class _Mark:
    """What MARK leaves on the stack."""


def unpickle(data: bytes, where: str) -> object:
    """Return what *data* holds: dict, list, tuple, set, numbers, text, records, tensor refs.

    Raises:
        UnsupportedError: it mentions a name that is not allowed.
        FormatError: it is no pickle, is cut off, or does what no framework's pickle does.
    """
    try:
        return _Machine(data, where).run()
    except (UnsupportedError, FormatError):
        raise
    except _BROKEN as error:
        raise _broken(where, f"{type(error).__name__}: {error}") from error


class _Machine:
    """A stack, a memo and the few opcodes that torch and pickle write for plain objects."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._at = 0
        self._where = where
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}
        self._made = 0
        if len(data) > _MOST_VALUES:  # else it is too short to push so many
            self.push = self._push_counted  # type: ignore[method-assign]

    def run(self) -> object:
        """Return what lies on the stack when the pickle ends."""
        opcodes = _OPCODES
        while (code := self._data[self._at : self._at + 1]) != b".":
            self._at += 1
            handler = opcodes.get(code)
            if handler is None:
                raise _broken(self._where, f"opcode {code!r} at byte {self._at - 1}")
            handler(self)
        if len(self._stack) != 1:
            raise _broken(self._where, f"{len(self._stack)} values left on the stack")
        value = self.pop()
        _check_tree(value, _COPIES * (len(self._data) + self._made))
        return value

    def take(self, count: int) -> bytes:
        """Return the next *count* bytes."""
        piece = self._data[self._at : self._at + count]
        if count < 0 or len(piece) != count:
            raise _broken(self._where, f"cut off: {count} bytes wanted at byte {self._at}")
        self._at += count
        return piece

    def number(self, count: int) -> int:
        """Return the next unsigned number of *count* bytes."""
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        """Return the text up to the next newline."""
        end = self._data.index(b"\n", self._at)
        return str(self.take(end + 1 - self._at)[:-1], "utf-8")

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def _push_counted(self, value: object) -> None:
        self._stack.append(value)
        self.count(1)

    def count(self, made: int) -> None:
        """Note how much was made; a pickle of a few bytes may ask for any number of copies."""
        self._made += made
        if self._made > _MOST_VALUES:
            raise _broken(self._where, f"more than {_MOST_VALUES} values")

    def pop(self) -> object:
        """Take a value from the stack; a mark is none."""
        value = self._stack.pop()
        if isinstance(value, _Mark):
            raise _broken(self._where, "a mark where a value belongs")
        return value

    def pop_tuple(self, count: int) -> tuple[object, ...]:
        """Take the last *count* values."""
        return tuple(reversed([self.pop() for _ in range(count)]))

    def pop_to_mark(self) -> list[object]:
        """Take the values above the last mark, and the mark."""
        at = len(self._stack) - 1
        while not isinstance(self._stack[at], _Mark):
            at -= 1
            if at < 0:
                raise _broken(self._where, "no mark on the stack")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def remember(self, key: int) -> None:
        """Keep the value on top of the stack under *key*."""
        self._memo[key] = self._stack[-1]

    def memoize(self) -> None:
        """Keep the value on top of the stack under the next key."""
        self._memo[len(self._memo)] = self._stack[-1]

    def recall(self, key: int) -> None:
        """Push what is kept under *key*."""
        self.push(self._memo[key])

    def push_name(self, module: str, name: str) -> None:
        """Push an allowed name: a dtype becomes its code at once."""
        text = f"{module}.{name}"
        if text not in ALLOWED:
            raise UnsupportedError(
                "a pickle that mentions something else than tensors and plain containers",
                where=self._where,
                expected="names that loader.weights.formats.allowed lists",
                got=repr(text)[:200],
                next_step="if this file is your own, save it without that object; never open it "
                "with a plain torch.load or pickle if it is not",
            )
        self.push(DTYPES.get(text) or Name(text))

    def push_global_from_stack(self) -> None:
        """STACK_GLOBAL."""
        module, name = self.pop_tuple(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise _broken(self._where, "a name that is no text")
        self.push_name(module, name)

    def append(self, values: list[object]) -> None:
        """Append to the list, or add to the set, on top of the stack."""
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            _check_keys(values)
            target.update(values)
        else:
            raise _broken(self._where, f"values put into a {type(target).__name__}")

    def set_items(self, values: list[object]) -> None:
        """Set keys and values of the dictionary on top of the stack."""
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise _broken(self._where, f"items put into a {type(target).__name__}")
        keys = values[::2]
        _check_keys(keys)
        target.update(zip(keys, values[1::2], strict=True))

    def build(self) -> None:
        """BUILD: the state of a record; a container's or a tensor's attributes are dropped."""
        state = self.pop()
        target = self._stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict | TensorRef):
            raise _broken(self._where, f"state given to a {type(target).__name__}")

    def push_storage(self) -> None:
        """BINPERSID: torch's ``("storage", class, key, device, count)``."""
        found = self.pop()
        if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage":
            raise _broken(self._where, "a persistent id that is no storage")
        _, kind, key, _, count = found
        dtype = STORAGES.get(kind.text) if isinstance(kind, Name) else None
        if dtype is None or not isinstance(key, str) or not is_count(count):
            raise _broken(self._where, "a storage without class, key or count")
        self.push(StorageRef(key, dtype, count))

    def call(self) -> None:
        """REDUCE, NEWOBJ: make the plain thing that stands for an allowed name and arguments."""
        args = self.pop()
        name = self.pop()
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise _broken(self._where, f"a call of a {type(name).__name__}")
        if len(args) == 1 and isinstance(args[0], Collection):  # which is copied
            self.count(len(args[0]))
        elif args and isinstance(args[0], str):
            self.count(len(args[0]) >> 3)
        self.push(make(name.text, args))


def _check_keys(keys: list[object]) -> list[object]:
    """Return *keys*, which are small: Python hashes tuples in tuples as deep as they go."""
    for key in keys:
        if type(key) is not tuple:
            continue
        left: list[tuple[object, ...]] = [key]
        seen = 0
        while left:
            item = left.pop()
            seen += 1 + len(item)
            if seen > _MOST_IN_KEY:
                raise ValueError("a key of more than a thousand values")
            left += [one for one in item if type(one) is tuple]
    return keys


def _check_tree(root: object, most: int) -> None:
    """Raise ValueError for what is deep, or refers to itself or to much again and again."""
    left, depth, seen = [root], 0, 0
    while left:
        depth += 1
        seen += len(left)
        if depth > _MOST_DEPTH or seen > most:
            raise ValueError("containers in containers, deeper or more often than they are made")
        left = [inner for one in left for inner in _children(one) if type(inner) in _CONTAINERS]


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Record):
        return (value.args, value.state)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _broken(where: str, got: str) -> FormatError:
    return FormatError(
        "a pickle that cannot be read",
        where=where,
        expected="what torch.save or torch.distributed.checkpoint writes",
        got=got[:300],
        next_step="fetch the file again; it is damaged, or no training framework wrote it",
    )


def _text(machine: _Machine, width: int) -> None:
    machine.push(str(machine.take(machine.number(width)), "utf-8", "surrogatepass"))


def _integer(machine: _Machine, count: int) -> None:
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


def _empty_set(machine: _Machine) -> None:
    machine.count(3)  # the largest of what a byte makes
    machine.push(set())


def _protocol(machine: _Machine) -> None:
    if (found := machine.number(1)) > _HIGHEST_PROTOCOL:
        raise ValueError(f"pickle protocol {found}")


# Handlers by opcode. What is missing is refused: calls by other ways (INST, OBJ, NEWOBJ_EX, EXT*),
# persistent ids as text, and out-of-band buffers.
_OPCODES: Mapping[bytes, Callable[[_Machine], object]] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m.take(8),
    b"(": lambda m: m.push(_Mark()),
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.pop_to_mark(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: _integer(m, 4),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: _integer(m, m.number(1)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: _text(m, 4),
    b"\x8c": lambda m: _text(m, 1),
    b"\x8d": lambda m: _text(m, 8),
    b"C": lambda m: m.push(m.take(m.number(1))),
    b"B": lambda m: m.push(m.take(m.number(4))),
    b"\x8e": lambda m: m.push(m.take(m.number(8))),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"\x8f": _empty_set,
    b")": lambda m: m.push(()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"\x90": lambda m: m.append(m.pop_to_mark()),
    b"l": lambda m: m.push(m.pop_to_mark()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.push(m.pop_tuple(1)),
    b"\x86": lambda m: m.push(m.pop_tuple(2)),
    b"\x87": lambda m: m.push(m.pop_tuple(3)),
    b"\x91": lambda m: m.push(frozenset(_check_keys(m.pop_to_mark()))),
    b"s": lambda m: m.set_items(list(m.pop_tuple(2))),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"c": lambda m: m.push_name(m.line(), m.line()),
    b"\x93": lambda m: m.push_global_from_stack(),
    b"R": lambda m: m.call(),
    b"\x81": lambda m: m.call(),
    b"b": lambda m: m.build(),
    b"q": lambda m: m.remember(m.number(1)),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.memoize(),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    b"Q": lambda m: m.push_storage(),
}
