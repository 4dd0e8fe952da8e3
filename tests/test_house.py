"""The house: imports go one way, sbi's private names stand in one file, files stay short.

`python tests/test_house.py` prints how many lines there are.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sbi.inference

PACKAGE = Path(__file__).resolve().parents[1] / "sbi_jeffreys"
FILES = sorted(PACKAGE.rglob("*.py"))

#: A room, and the rooms that it may import from beside itself.
ROOMS = {
    "_checks": set(),
    "_sbi": set(),
    "objective": set(),
    "networks": {"objective", "_sbi", "_checks"},
    "proxies": {"networks", "objective", "_sbi", "_checks"},
    "options": {"proxies", "networks", "objective", "_sbi", "_checks"},
    "posteriors": {"proxies", "networks", "objective", "_sbi", "_checks"},
    "diagnostics": {"posteriors", "proxies", "networks", "objective", "_sbi", "_checks"},
}
ROOMS["training"] = {"options", *ROOMS["diagnostics"], "diagnostics"}
ROOMS["npe"] = {"training", *ROOMS["training"]}
ROOMS["__init__"] = {"npe", *ROOMS["npe"]}
ROOMS["benchmark"] = {"__init__", *ROOMS["__init__"]}
ROOMS["__main__"] = {"benchmark", *ROOMS["benchmark"]}


def name_of(path: Path) -> str:
    """Dotted name below the package: `training.stage`, and `proxies` for its `__init__`."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, those that only a type checker reads left out."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from statements(child)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    found: set[str] = set()
    for node in statements(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in below if name.removeprefix("sbi_jeffreys.") in MODULES}
            others = len(modules) < len(below)
            found |= modules | ({node.module} if others or not modules else set())
    ours = {name for name in found if name.split(".")[0] == "sbi_jeffreys"}
    return {name.removeprefix("sbi_jeffreys").lstrip(".") or "__init__" for name in ours}


GRAPH = {name: imported(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_down(module: str):
    room = module.split(".")[0]
    wrong = {
        target
        for target in GRAPH[module]
        if target.split(".")[0] != room and target.split(".")[0] not in ROOMS[room]
    }
    assert not wrong, f"{module} imports from rooms above or beside it: {sorted(wrong)}"


def test_no_import_goes_round():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for target in GRAPH.get(name, ()):
            visit(target, (*above, name))
        done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_the_top_has_at_most_twelve_rooms():
    rooms = {name.split(".")[0] for name in GRAPH}
    assert rooms == set(ROOMS)
    assert len([room for room in rooms if not room.startswith("__")]) <= 12


def test_files_are_short():
    long = {name: count(path) for name, path in MODULES.items() if count(path) > 320}
    assert not long


# ------------------------------------------------------------------ sbi's private names


def private_names() -> set[str]:
    """Attributes of sbi's trainer and posteriors that begin with an underscore."""
    from sbi.inference.posteriors import DirectPosterior, EnsemblePosterior

    classes = (sbi.inference.NPE, DirectPosterior, EnsemblePosterior)
    names: set[str] = set()
    for cls in {base for one in classes for base in one.__mro__ if "sbi" in base.__module__}:
        names |= set(vars(cls))
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[cls.__module__]))):
            on_self = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
            if on_self and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


PRIVATE = private_names()


def test_the_list_of_private_names_has_the_known_ones():
    assert {"_neural_net", "_prior", "_device", "_round", "_summary", "_tracker"} <= PRIVATE


#: Our own attributes of the same name, and what sbi's posteriors offer to their subclasses.
ALLOWED = {"_purpose", "_x_else_default_x", "_device"}


@pytest.mark.parametrize("module", sorted(set(GRAPH) - {"_sbi"}))
def test_private_names_of_sbi_stand_in_one_file(module: str):
    tree = tree_of(MODULES[module])
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    used = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE - own:
            on_self = ast.unparse(node.value) == "self" and node.attr in ALLOWED
            if not on_self:
                used.append(f"{ast.unparse(node)} (line {node.lineno})")
        private = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sbi.")
        if private and any(part.startswith("_") for part in (node.module or "").split(".")):
            used.append(f"import of {node.module} (line {node.lineno})")
    assert not used, f"{module}: {used}; put an accessor into sbi_jeffreys/_sbi.py"


def count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Print the number of lines, room by room."""
    rooms: dict[str, int] = {}
    for name, path in MODULES.items():
        room = name.split(".")[0]
        rooms[room] = rooms.get(room, 0) + count(path)
    for room, lines in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"{room:12} {lines:6,}")
    bench = rooms["benchmark"]
    print(f"{'core':12} {sum(rooms.values()) - bench:6,}\n{'benchmark':12} {bench:6,}")


if __name__ == "__main__":
    main()
