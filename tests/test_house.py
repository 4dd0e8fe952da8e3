"""The house: imports go one way, sbi's private names stand in one file, files stay short.

`python tests/test_house.py` prints how many lines there are.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
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
    names = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.If) and ast.unparse(node.test) in names


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without what only a type checker reads."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and is_type_checking(node):
        children = node.orelse
    for child in children:
        yield child
        yield from statements(child)


def imported(tree: ast.Module, package: str) -> set[str]:
    """Modules of ours that a file imports, also inside functions.

    Args:
        tree: The file.
        package: Dotted name of the package that the file is in, for relative imports.
    """
    found: set[str] = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            below = {f"{origin}.{alias.name}" for alias in node.names}
            modules = {name for name in below if name.removeprefix("sbi_jeffreys.") in MODULES}
            found |= modules | ({origin} if len(modules) < len(below) else set())
    ours = {name for name in found if name.split(".")[0] == "sbi_jeffreys"}
    return {name.removeprefix("sbi_jeffreys").lstrip(".") or "__init__" for name in ours}


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(PACKAGE.parent).parts)


GRAPH = {name: imported(tree_of(path), package_of(path)) for name, path in MODULES.items()}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sbi_jeffreys.npe", {"npe"}),
        ("from sbi_jeffreys import NPE_Jeffreys", {"__init__"}),
        ("from sbi_jeffreys import _sbi, NPE_Jeffreys", {"_sbi", "__init__"}),
        ("from .base import Proxy", {"proxies.base"}),
        ("from . import base, Proxy", {"proxies.base", "proxies"}),
        ("from ..networks import fitting", {"networks.fitting"}),
        ("from ..npe import NPE_Jeffreys", {"npe"}),
        ("def f():\n    from sbi_jeffreys.npe import NPE_Jeffreys", {"npe"}),
        ("if TYPE_CHECKING:\n    import sbi_jeffreys.npe", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import sbi_jeffreys.npe", {"npe"}),
        ("import torch, sbi.inference", set()),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: set[str]):
    assert imported(ast.parse(source), "sbi_jeffreys.proxies") == expected


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


def defined(cls: ast.ClassDef) -> set[str]:
    """Names of methods, class attributes, and attributes that methods set on `self`."""
    names = {node.name for node in ast.walk(cls) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    for statement in cls.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = list(ast.iter_child_nodes(statement))
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def with_class(
    node: ast.AST, cls: ast.ClassDef | None = None
) -> Iterator[tuple[ast.AST, ast.ClassDef | None]]:
    """All nodes below, each with the class that it is in."""
    for child in ast.iter_child_nodes(node):
        inner = child if isinstance(child, ast.ClassDef) else cls
        yield child, inner
        yield from with_class(child, inner)


OURS = {name for path in FILES for cls in ast.walk(tree_of(path)) if isinstance(cls, ast.ClassDef)
        for name in defined(cls)}  # fmt: skip


def private_uses(tree: ast.Module, free: set[str]) -> list[str]:
    """What a file takes from sbi that is private there, as source with line numbers.

    An attribute with an underscore is ours if our classes define it and sbi's do not. Where both
    do, it is ours on `self` in a class that defines it and does not derive from sbi.

    Args:
        tree: The file.
        free: Names of its classes that do not derive from a class of sbi.
    """
    used: list[str] = []
    for node, cls in with_class(tree):
        wrong = False
        if isinstance(node, ast.Attribute):
            own = cls is not None and ast.unparse(node.value) in ("self", "cls", "super()")
            if node.attr in PRIVATE:
                wrong = not (own and cls and cls.name in free and node.attr in defined(cls))
            elif node.attr.startswith("_") and not node.attr.startswith("__"):
                wrong = not own and node.attr not in OURS
        elif isinstance(node, ast.FunctionDef) and cls is not None:
            wrong = node.name in PRIVATE and cls.name not in free  # an override of a private hook
        elif isinstance(node, ast.Constant):  # getattr(trainer, "_round"), state["_prior"]
            wrong = isinstance(node.value, str) and node.value in PRIVATE
        elif isinstance(node, ast.Import | ast.ImportFrom):
            origin = (getattr(node, "module", None) or "").split(".")
            names = [[*filter(None, origin), *alias.name.split(".")] for alias in node.names]
            wrong = any(
                parts[0] == "sbi" and any(part.startswith("_") for part in parts) for parts in names
            )
        if wrong:
            used.append(f"{ast.unparse(node).splitlines()[0]} (line {node.lineno})")  # type: ignore[attr-defined]
    return used


def free_classes(module: str) -> set[str]:
    """Names of a module's classes that do not derive from a class of sbi."""
    loaded = importlib.import_module(f"sbi_jeffreys.{module}".removesuffix(".__init__"))
    classes = {name: value for name, value in vars(loaded).items() if isinstance(value, type)}
    from_sbi = {
        name
        for name, cls in classes.items()
        if any(base.__module__.split(".")[0] == "sbi" for base in cls.__mro__)
    }
    return set(classes) - from_sbi


@pytest.mark.parametrize("module", sorted(set(GRAPH) - {"_sbi"}))
def test_private_names_of_sbi_stand_in_one_file(module: str):
    used = private_uses(tree_of(MODULES[module]), free_classes(module))
    assert not used, f"{module}: {used}; put an accessor into sbi_jeffreys/_sbi.py"


@pytest.mark.parametrize(
    "source",
    [
        "trainer._neural_net",
        "class Mine:\n    def f(self, trainer):\n        self._prior = trainer._prior",
        "class Derived(NPE):\n    def f(self):\n        self._round = 0",
        "class Derived(NPE):\n    def _converged(self): ...",
        "class Derived(NPE):\n    def f(self):\n        return self._summary",
        "class Mine:\n    def f(self):\n        return self._summary",
        "getattr(trainer, '_tracker')",
        "state['_data_round_index']",
        "mixture._transform_shift",
        "from sbi.inference.trainers._contracts import LossArgsNPE",
        "from sbi.inference.trainers import _contracts",
        "import sbi.inference.trainers._contracts",
        "from sbi.utils.sbiutils import _hidden",
    ],
)
def test_every_way_to_a_private_name_is_seen(source: str):
    assert private_uses(ast.parse(source), {"Mine"})


def test_a_private_name_of_our_own_is_free():
    source = "class Mine:\n    def f(self):\n        self._prior = 0\n        return self._prior"
    assert not private_uses(ast.parse(source), {"Mine"})


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
