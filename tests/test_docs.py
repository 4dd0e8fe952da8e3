"""What the documentation says is tried: examples run, links lead somewhere, every name is said."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from sbi.utils import BoxUniform

import sbi_jeffreys
import sbi_jeffreys.npe

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


_PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmark_results/README.md"]
_PAGES += sorted(f"docs/{path.name}" for path in (_ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", _PAGES)
def test_relative_links_lead_to_files(path):
    document = _ROOT / path
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [t.replace("_copied/", "../") for t in targets if not re.match(r"[a-z]+:", t)]
    missing = [t for t in local if not (document.parent / t).exists()]
    assert not missing, f"{path} links to what does not exist: {missing}"


# ------------------------------------------------------------------ snippets

_NOT_RUN = "<!-- not run"


def snippets(text: str) -> list[str]:
    """The Python blocks of a page, without those after a comment that says why they are not run."""
    found = re.findall(r"(?:^(<!--.*?-->)\n)?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for comment, code in found if not comment.startswith(_NOT_RUN)]


_WITH_SNIPPETS = [path for path in _PAGES if snippets((_ROOT / path).read_text(encoding="utf-8"))]


def test_snippets_are_found_and_marked_ones_are_left_out():
    text = "```python\na\n```\n\n<!-- not run: why -->\n```python\nb\n```\n```bash\nc\n```\n"
    assert snippets(text) == ["a\n"]
    assert {"README.md", "docs/quickstart.md", "docs/your_simulator.md"} <= set(_WITH_SNIPPETS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", _WITH_SNIPPETS)
def test_snippets_run(path, monkeypatch):
    """All blocks of a page in one namespace, in an empty folder, with a few epochs of training."""
    train = sbi_jeffreys.NPE_Jeffreys.train
    few = functools.partialmethod(train, max_num_epochs=2)
    monkeypatch.setattr(sbi_jeffreys.NPE_Jeffreys, "train", few)
    experts = (sbi_jeffreys.RegressionExpert(1),)
    fast = {"proxy_folds": 1, "proxy_draws": 2_000, "experts": experts}
    small = functools.partial(sbi_jeffreys.JeffreysOptions, **fast)
    small.preset = sbi_jeffreys.JeffreysOptions.preset  # type: ignore[attr-defined]
    monkeypatch.setattr(sbi_jeffreys.npe, "JeffreysOptions", small)  # the default options
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((200,))
    x = theta + 0.2 * torch.randn_like(theta)
    # The README and the site's first page begin where a user of sbi has these already.
    names = {"prior": prior, "theta": theta, "x": x, "x_o": x[0]}
    for code in snippets((_ROOT / path).read_text(encoding="utf-8")):
        exec(compile(code, path, "exec"), names)
