"""What podloader uses of vLLM, compared with the sources of a release.

What is used is read from ``loader.serve.vllm.private``'s tables and from the room's own code: each
name has to be there, with the members that are used, and take the arguments that it is called with.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from loader.serve.vllm import private
from loader.serve.vllm.private import IMPORTED, REACHED, SPOKEN, Private

TABLES: Mapping[str, Private | str] = {**IMPORTED, **REACHED, **SPOKEN}
ROOM = Path(private.__file__).parent
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Call:
    """A call in the room: of a name, or of a member of it."""

    where: str
    owner: str
    member: str
    node: ast.Call


@dataclass(frozen=True)
class Use:
    """An attribute of one of vLLM's objects, somewhere in the room."""

    where: str
    owner: str
    member: str


def read_source(file: Path) -> str:
    """Return what *file* holds."""
    return file.read_text(encoding="utf-8")


def breaks(
    sources: Path, names: Collection[str] = TABLES, read: Callable[[Path], str] = read_source
) -> list[str]:
    """Return what podloader would miss with the vLLM in *sources*, nothing where it would run.

    *names* are those of the tables that are looked at; *read* gives a file's text.
    """
    release = Release(sources, read)
    found: list[str] = []
    for name in names:
        if name in IMPORTED:
            found += _check_imported(release, name, IMPORTED[name])
        elif name in REACHED:
            entry = REACHED[name]
            found += _check_members(release, name, entry, release.places(entry.places))
        elif not release.says(SPOKEN[name], name):
            found.append(f"{name!r} is no longer said in {SPOKEN[name]}")
    for call in room_calls():
        if call.owner in names:
            found += _check_call(release, call)
    return list(dict.fromkeys(found))


# What the room uses.


def room_files() -> list[Path]:
    """Return the room's files."""
    return sorted(ROOM.glob("*.py"))


_parse = cache(ast.parse)


@cache
def _walk(node: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(node))


def room_calls() -> list[Call]:
    """Return each call of a private name, or of a member of one."""
    return [
        Call(f"{path.name}:{node.lineno}", *target, node)
        for path in room_files()
        for node in _walk(_parse(read_source(path)))
        if isinstance(node, ast.Call) and (target := _target(node.func))
    ]


def room_uses() -> list[Use]:
    """Return each attribute that is taken of one of vLLM's objects."""
    return [
        Use(f"{path.name}:{node.lineno}", owner, node.attr)
        for path in room_files()
        for node in _walk(_parse(read_source(path)))
        if isinstance(node, ast.Attribute) and (owner := _owner(node))
    ]


def _target(function: ast.expr) -> tuple[str, str] | None:
    if isinstance(function, ast.Name):
        return (function.id, "") if function.id in IMPORTED else None
    if isinstance(function, ast.Attribute) and (owner := _owner(function)):
        return owner, function.attr
    return None


def _owner(node: ast.Attribute) -> str:
    """Return the table's key for what *node* is an attribute of, empty where vLLM has no part."""
    value = node.value
    last = value.id if isinstance(value, ast.Name) else f".{getattr(value, 'attr', '')}"
    bare = last.lstrip("._")
    names = (last, _ALIASES.get(bare, bare))
    return next((name for name in names if name in IMPORTED or name in REACHED), "")


_ALIASES = {"models": "OpenAIServingModels", "openai_serving_models": "OpenAIServingModels"}


# What a release has.


class Release:
    """The sources of one release, parsed as they are asked for."""

    def __init__(self, root: Path, read: Callable[[Path], str]) -> None:
        self._root, self._read = root, read
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Return the module *name*, None where there is none."""
        if name not in self._modules:
            path = self._root / name.replace(".", "/")
            files = (path.with_suffix(".py"), path / "__init__.py")
            file = next((file for file in files if file.is_file()), None)
            self._modules[name] = Module(self, name, file, self._read(file)) if file else None
        return self._modules[name]

    def places(self, places: tuple[str, ...]) -> list[tuple[Module, str]]:
        """Return those of *places* that there are: a module and what is meant in it."""
        split = (place.partition(":") for place in places)
        return [(found, what) for name, _, what in split if (found := self.module(name))]

    def says(self, place: str, text: str) -> bool:
        """Return whether *text* begins a string in the module *place*."""
        module = self.module(place)
        return module is not None and any(said.startswith(text) for said in module.strings)


class Module:
    """One module of a release."""

    def __init__(self, release: Release, name: str, file: Path, text: str) -> None:
        self.release, self.name = release, name
        self.package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        self.tree = _parse(text)

    @cached_property
    def strings(self) -> set[str]:
        """All strings in it."""
        nodes = _walk(self.tree)
        return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}

    @cached_property
    def defined(self) -> dict[str, ast.stmt]:
        """What stands at its top level, under an ``if`` or a ``try`` as well."""
        found: dict[str, ast.stmt] = {}
        for statement in _top_level(self.tree.body):
            for name in _names_of(statement):
                found[name] = statement
        return found

    def find(self, name: str) -> tuple[Module, ast.stmt] | None:
        """Return where *name* is defined, re-exports followed; None where it is not known here."""
        statement = self.defined.get(name)
        if isinstance(statement, ast.ImportFrom):
            alias = next(a for a in statement.names if (a.asname or a.name) == name)
            origin = self.release.module(_absolute(statement, self.package))
            return origin.find(alias.name) if origin else (self, statement)
        if statement is not None:
            return self, statement
        if "__getattr__" in self.defined and name in self.strings:
            return self, self.defined["__getattr__"]
        return None

    def calls(self, name: str) -> bool:
        """Return whether its code calls *name*."""
        nodes = _walk(self.tree)
        calls = (node.func for node in nodes if isinstance(node, ast.Call))
        return any(isinstance(called, ast.Name) and called.id == name for called in calls)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _top_level(getattr(statement, part, []))


def _names_of(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign():
            return [target.id for target in statement.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.ImportFrom() | ast.Import():
            return [alias.asname or alias.name for alias in statement.names]
    return []


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    if not statement.level:
        return statement.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - statement.level + 1]
    return ".".join([*parts, *filter(None, [statement.module])])


@dataclass(frozen=True)
class Class:
    """A class of a release, with what it inherits from vLLM's own."""

    module: Module
    node: ast.ClassDef

    @cached_property
    def lineage(self) -> list[ast.ClassDef]:
        """Itself, then its bases as far as they are vLLM's."""
        found = [self.node]
        for base in self.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(name, ast.Name) and (other := _class_of(self.module, name.id)):
                found += other.lineage
        return found

    @cached_property
    def fields(self) -> dict[str, bool]:
        """Its annotated fields in order; whether each has a default."""
        found: dict[str, bool] = {}
        for node in reversed(self.lineage):
            for statement in node.body:
                match statement:
                    case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=value):
                        if "ClassVar" not in ast.dump(kind):
                            found[name] = value is not None
        return found

    @cached_property
    def members(self) -> set[str]:
        """All that an instance has."""
        found = set(self.fields)
        for node in self.lineage:
            for inner in _walk(node):
                match inner:
                    case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                        found.add(name)
            for statement in node.body:
                found.update(_names_of(statement))
        return found

    def method(self, name: str) -> _Function | None:
        """Return the method *name*."""
        for node in self.lineage:
            for statement in node.body:
                if isinstance(statement, _Function) and statement.name == name:
                    return statement
        return None


def _class_of(module: Module, name: str) -> Class | None:
    """Return the class *name*, or that of the object of this name."""
    found = module.find(name)
    if found is None:
        return None
    home, node = found
    if isinstance(node, ast.ClassDef):
        return Class(home, node)
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id != name:
        return _class_of(home, value.func.id)
    return None


# The comparison.


def _check_imported(release: Release, name: str, entry: Private) -> list[str]:
    homes = [(m, name) for m, _ in release.places(entry.places) if m.find(name)]
    if not homes:
        return [f"{name} is in none of {', '.join(entry.places)}"]
    if entry.patched and not homes[0][0].calls(name):
        return [f"{homes[0][0].name} does not call {name}, which is replaced there"]
    return _check_members(release, name, entry, homes)


def _check_members(
    release: Release, name: str, entry: Private, places: list[tuple[Module, str]]
) -> list[str]:
    if not places:
        return [f"{name}: there is none of {', '.join(entry.places)}"]
    found = []
    for used in entry.members:
        member, _, parameters = used.partition("(")
        classes = [c for m, what in places if (c := _class_of(m, what))]
        known = any(member in c.members for c in classes) or any(
            member in _given(m, what) for m, what in places
        )
        if not known:
            found.append(f"{name}.{member} is not in {', '.join(entry.places)}")
        elif parameters:
            wanted = [p.strip() for p in parameters.rstrip(")").split(",")]
            own = next((f for c in classes if (f := c.method(member))), None)
            if own is None or [a.arg for a in own.args.args][1 : len(wanted) + 1] != wanted:
                found.append(f"{name}.{member} takes other parameters than {', '.join(wanted)}")
    return found


def _given(module: Module, what: str) -> set[str]:
    """Return what *module* puts into an object that has no class: ``state``, or ``args``."""
    if what == "state":
        attributes = (n for n in _walk(module.tree) if isinstance(n, ast.Attribute))
        stored = (n for n in attributes if isinstance(n.ctx, ast.Store))
        return {n.attr for n in stored if what in (_name_of(n.value), getattr(n.value, "attr", ""))}
    if what != "args":
        return set()
    classes = (node for node in _walk(module.tree) if isinstance(node, ast.ClassDef))
    found = {field for node in classes for field in Class(module, node).fields}
    for node in _walk(module.tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=words):
                names = [str(word.value) for word in words if isinstance(word, ast.Constant)]
                found.update(name.lstrip("-").replace("-", "_") for name in names)
    return found


def _name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _check_call(release: Release, call: Call) -> list[str]:
    entry = IMPORTED.get(call.owner) or REACHED[call.owner]
    for module, what in release.places(entry.places):
        name = what or call.owner
        owner = _class_of(module, name)
        if call.member:
            function = owner.method(call.member) if owner else None
            problem = _arguments_of(call.node, function, bound=True) if function else ""
        elif owner is not None:
            problem = _fields_of(call.node, owner)
        else:
            found = module.find(name)
            function = found[1] if found and isinstance(found[1], _Function) else None
            problem = _arguments_of(call.node, function, bound=False) if function else ""
        if problem:
            called = ".".join(filter(None, [call.owner, call.member]))
            return [f"{called} {problem} ({call.where})"]
    return []


def _arguments_of(call: ast.Call, function: _Function, *, bound: bool) -> str:
    """Return why *function* would refuse the arguments of *call*, empty where it takes them."""
    taken = function.args
    static = any(
        isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list
    )
    positional = [a.arg for a in (*taken.posonlyargs, *taken.args)][int(bound and not static) :]
    keywords = [a.arg for a in taken.kwonlyargs]
    given = {k.arg for k in call.keywords if k.arg}
    if len(call.args) > len(positional) and not taken.vararg:
        return f"takes {len(positional)} arguments by position, not {len(call.args)}"
    if not taken.kwarg and (unknown := given - {*positional, *keywords}):
        return f"takes no argument {', '.join(sorted(unknown))}"
    if any(k.arg is None for k in call.keywords) or any(
        isinstance(a, ast.Starred) for a in call.args
    ):
        return ""
    required = positional[: len(positional) - len(taken.defaults)][len(call.args) :]
    required += [k for k, d in zip(keywords, taken.kw_defaults, strict=True) if d is None]
    missing = [name for name in required if name not in given]
    return f"needs the argument {', '.join(missing)}" if missing else ""


def _fields_of(call: ast.Call, owner: Class) -> str:
    init = owner.method("__init__")
    if init is not None:
        return _arguments_of(call, init, bound=True)
    given = {k.arg for k in call.keywords if k.arg}
    if unknown := given - owner.fields.keys():
        return f"has no field {', '.join(sorted(unknown))}"
    if len(call.args) > len(owner.fields):
        return f"has {len(owner.fields)} fields, not {len(call.args)}"
    if any(k.arg is None for k in call.keywords):
        return ""
    required = [name for name, has_default in owner.fields.items() if not has_default]
    missing = [n for n in required if n not in given and n not in [*owner.fields][: len(call.args)]]
    return f"needs {', '.join(missing)}" if missing else ""
