"""Configuration of the documentation site; docs/README.md says how to build it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

from sbi_jeffreys import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "sbi_jeffreys"
author = "The sbi_jeffreys authors"
release = version = __version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["README.md", "_build"]

# Pages and notebooks
nb_execution_mode = "off"  # notebooks are committed with their outputs
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]

# The API from Google docstrings
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
default_role = "py:obj"
python_use_unqualified_type_names = True
add_module_names = False
# Internal references must resolve. Those to other packages are not looked up, and neither are the
# single backticks of docstrings, which mark shapes and values as well as names.
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*"), ("py:.*", r"(?!sbi_jeffreys\.).*")]

# Appearance
html_theme = "furo"
html_title = f"sbi_jeffreys {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# What stands elsewhere in the repository is copied below docs/_copied, which git ignores.
COPIED = DOCS / "_copied"
SOURCES = [
    "tutorials/*.ipynb",
    "benchmark_results/README.md",
    "benchmark_results/*/*.md",
    "benchmark_results/report/*.png",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]


def copy_sources() -> None:
    """Copy pages and notebooks; their links to docs/ become links within the site."""
    shutil.rmtree(COPIED, ignore_errors=True)
    for source in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        target = COPIED / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            target.write_text(text.replace("](../docs/", "](../../"), encoding="utf-8")
        else:
            shutil.copy(source, target)


def escape_bars(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Escape bars as in p(·|x), which reStructuredText takes for substitutions."""
    lines[:] = [line if ">>>" in line else _BAR.sub(r"\\|", line) for line in lines]


_BAR = re.compile(r"(?<=[^\w\s`|])\|(?=\w)")


def setup(app: Sphinx) -> None:
    """Connect the hook, which comes after napoleon's."""
    app.connect("autodoc-process-docstring", escape_bars, priority=900)


copy_sources()
