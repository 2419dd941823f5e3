"""The numbers of src/: lines, longest functions, most parameters, private names of other libraries.

    python -m scripts.house             # the numbers, and what is over a limit
    python -m scripts.house --shrink    # takes out of tests/house/ what is no longer there; nothing is ever added

tests/house/ holds three lists that may only get shorter: private_names.txt, the places that use a name which another library
does not promise; silent_names.txt, what breaks without a word when a library changes it; limits.txt, what is over a limit.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PRIVATE_NAMES = ROOT / "tests/house/private_names.txt"
SILENT_NAMES = ROOT / "tests/house/silent_names.txt"
LIMITS = ROOT / "tests/house/limits.txt"
SLOW = ROOT / "tests/slow.txt"

LIMIT = {
    "file_lines": 300,
    "function_lines": 60,
    "parameters": 6,
    "own_lines": 3550,
}  # own: of src/ outside src/engine/
# Underscored names that the standard library documents: namedtuple's methods, and os._exit.
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit"}
OF_PYTHON = {"builtins", "abc", "enum", "typing", "dataclasses", "contextlib"}  # whose base classes hold no surprise
ATTRIBUTE_FUNCTIONS = ("getattr", "hasattr", "setattr", "delattr")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class PrivateName:
    """A line of private_names.txt: `file | name | where it is defined | why it is needed | public way, or -`."""

    file: str
    name: str
    where: str  # module, or module:Class, whose attribute or source text has the name
    why: str
    public: str

    @property
    def place(self) -> tuple[str, str]:
        return self.file, self.name


def allowed_private_names() -> list[PrivateName]:
    return [PrivateName(*(part.strip() for part in line.split("|"))) for line in entries(PRIVATE_NAMES)]


def allowed_excesses() -> dict[tuple[str, str], int]:
    """(kind, place) -> the number that it may have at most: `file_lines src/run.py 316`."""
    lines = (line.split() for line in entries(LIMITS))
    return {(kind, place): int(number) for kind, place, number in lines}


def entries(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of each file of src/, by its path."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}


def private_names() -> set[tuple[str, str]]:
    """(file, name) for each private name of another library that src/ imports, reads, sets or overrides."""
    places = set()
    everywhere = {name for tree in trees().values() for name in _defined(tree)}
    for file, tree in trees().items():
        here, inherited = set(_defined(tree)), _inherited(file, tree)
        for owner, name in _used(tree):
            ours = name in here or (owner in ("self", "cls", "src") and name in everywhere)
            if name not in DOCUMENTED and (name in inherited or not ours):
                places.add((file, name))
        places |= {(file, name) for name in inherited & here}
    return places


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names that are defined here: functions, classes, variables, and attributes that an object gives itself."""
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _used(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(of what, name): private names that are read or set on something, or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.value.id if isinstance(node.value, ast.Name) else "", node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [*module.split("."), *(part for alias in node.names for part in alias.name.split("."))]
            owner = module.partition(".")[0]
            yield from ((owner, name) for name in names if is_private(name))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ATTRIBUTE_FUNCTIONS:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name):
                yield "", name


def _inherited(file: str, tree: ast.Module) -> set[str]:
    """Private names that a class of this file uses or defines, and that a base class of another library has too."""
    if "hydra_plugins" in file or file.endswith("__main__.py"):  # cannot be imported by their path
        return set()
    module = importlib.import_module(module_name(file))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = {child.name for child in node.body if isinstance(child, Function)}
            own |= {
                child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute) and _is_self(child.value)
            }
            for base in getattr(module, node.name).__mro__:
                if base.__module__.split(".")[0] not in ("src", *OF_PYTHON):
                    names |= {name for name in own if is_private(name)} & _private_members(base)
    return names


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@cache
def _private_members(cls: type) -> set[str]:
    """Of the class, and what its methods set on self."""
    try:
        assigned = re.findall(r"\bself\.(_\w+)\b", inspect.getsource(cls))
    except (OSError, TypeError):  # written in C
        assigned = []
    return {name for name in [*vars(cls), *assigned] if is_private(name)}


def exists(where: str, name: str) -> bool:
    """Whether `module` or `module:Class` has the name, as an attribute or in its source text."""
    module, _, qualified = where.partition(":")
    thing = importlib.import_module(module)
    for part in filter(None, qualified.split(".")):
        thing = getattr(thing, part)
    if hasattr(thing, name) or any(part == name for part in module.split(".")):
        return True
    try:
        return re.search(rf"\b{re.escape(name)}\b", inspect.getsource(thing)) is not None
    except (OSError, TypeError):
        return False


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Every function with its name, of a method Class.method."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, Function | ast.ClassDef):
                inner = f"{prefix}{child.name}."
                if isinstance(child, Function):
                    yield inner[:-1], child
            yield from walk(child, inner)

    yield from walk(tree, "")


def parameter_count(function: Function) -> int:
    """All that a caller may give, without self and cls."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(1 for argument in every if argument is not None and argument.arg not in ("self", "cls"))


def measures() -> dict[tuple[str, str], int]:
    """(kind, place) -> number, for every file and function of src/."""
    numbers = {("own_lines", "src"): 0}
    for file, tree in trees().items():
        numbers["file_lines", file] = len((ROOT / file).read_text().splitlines())
        if not file.startswith("src/engine/"):
            numbers["own_lines", "src"] += numbers["file_lines", file]
        for name, function in functions(tree):
            numbers["function_lines", f"{file}:{name}"] = function.end_lineno - function.lineno + 1
            numbers["parameters", f"{file}:{name}"] = parameter_count(function)
    return numbers


def excesses() -> dict[tuple[str, str], int]:
    return {key: number for key, number in measures().items() if number > LIMIT[key[0]]}


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.Module, everywhere: bool = False) -> set[str]:
    """The modules of src/ that a file imports at its top, or everywhere: also inside of functions."""
    modules = {module_name(file) for file in trees()}
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "src"}


def upward_imports() -> set[str]:
    """`file module` for each module of src/ outside src/engine/ that a file inside it imports."""
    return {
        f"{file} {module}"
        for file, tree in trees().items()
        if file.startswith("src/engine/")
        for module in imports(tree, everywhere=True)
        if not f"{module}.".startswith("src.engine.")
    }


def shrink() -> None:
    """Takes out of the lists what is no longer there, and lowers the numbers that fell."""
    used, over = private_names(), excesses()

    def private(line: str) -> str | None:
        file, name = (part.strip() for part in line.split("|")[:2])
        return line if (file, name) in used else None

    def silent(line: str) -> str | None:
        file, text = (part.strip() for part in line.split("|")[:2])
        return line if (ROOT / file).exists() and text in (ROOT / file).read_text() else None

    def limit(line: str) -> str | None:
        kind, place, number = line.split()
        return f"{kind} {place} {min(int(number), over[kind, place])}" if (kind, place) in over else None

    def slow(line: str) -> str | None:
        return line if (ROOT / line.partition("::")[0]).exists() else None

    for file, keep in ((PRIVATE_NAMES, private), (SILENT_NAMES, silent), (LIMITS, limit), (SLOW, slow)):
        lines = [line if line.startswith("#") else keep(line) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{line}\n" for line in lines if line is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", action="store_true")
    if parser.parse_args().shrink:
        shrink()
    numbers = measures()
    of_kind = {kind: {place: n for (k, place), n in numbers.items() if k == kind} for kind, _ in numbers}
    print(f"files {len(of_kind['file_lines'])}, lines {sum(of_kind['file_lines'].values())}")
    for kind, places in of_kind.items():
        longest = sorted(places.items(), key=lambda item: -item[1])[:3]
        print(f"{kind}: " + ", ".join(f"{place} {number}" for place, number in longest))
    print(f"over a limit: {len(excesses())}")
    print(f"imports from src/engine/ to outside: {len(upward_imports())}")
    names = private_names()
    print(f"private names of other libraries: {len(names)} places")
    allowed = {entry.place for entry in allowed_private_names()}
    for file, name in sorted(names):
        print(f"  {'' if (file, name) in allowed else 'NEW '}{file} {name}")


if __name__ == "__main__":
    main()
