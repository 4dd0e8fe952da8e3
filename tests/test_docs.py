"""What the documentation says is tried: examples run, links lead somewhere, every name is said."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import sbi_jeffreys

_ROOT = Path(__file__).parents[1]
_MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(sbi_jeffreys.__path__, "sbi_jeffreys.")
    if not name.endswith("__main__")
)
_PACKAGE = Path(sbi_jeffreys.__path__[0])


def _has_examples(name: str) -> bool:
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return bool(re.search(r">>> (?!#)", path.read_text(encoding="utf-8")))


_EXAMPLES = [name for name in _MODULES if _has_examples(name)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _EXAMPLES)
def test_examples_run_and_print_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_trainer_and_the_report_have_examples():
    assert {"sbi_jeffreys.npe", "sbi_jeffreys.diagnostics.report"} <= set(_EXAMPLES)


@pytest.mark.parametrize("name", ["sbi_jeffreys", *_MODULES])
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__ or not hasattr(module, "__all__"), f"{name} has no docstring"
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        ours = getattr(thing, "__module__", "").startswith("sbi_jeffreys")
        if ours and (inspect.isclass(thing) or inspect.isfunction(thing)):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


@pytest.mark.parametrize(
    "path", ["README.md", "CHANGELOG.md", "docs/README.md", "benchmark_results/README.md"]
)
def test_relative_links_lead_to_files(path):
    document = _ROOT / path
    if not document.exists():
        pytest.skip(f"no {path}")
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    missing = [t for t in local if not (document.parent / t).exists()]
    assert not missing, f"{path} links to what does not exist: {missing}"


@pytest.mark.filterwarnings("ignore")
def test_api_pages_build(tmp_path):
    pdoc = pytest.importorskip("pdoc", reason="extra `docs`")
    pdoc.pdoc("sbi_jeffreys", output_directory=tmp_path)
    page = (tmp_path / "sbi_jeffreys.html").read_text(encoding="utf-8")
    for name in sbi_jeffreys.__all__:
        assert name in page
    for module in ("diagnostics/report", "training/multipliers", "objective", "diagnostics/plots"):
        assert (tmp_path / "sbi_jeffreys" / f"{module}.html").stat().st_size > 10_000
