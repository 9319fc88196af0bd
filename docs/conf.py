"""Sphinx settings: `make docs`. The pages in docs/api are written here, one per package."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import querydet_jax

project = "querydet_jax"
author = "The querydet_jax developers"
copyright = "The querydet_jax developers; Apache-2.0"
version = release = querydet_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"querydet_jax {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# `Conv` names the weights in `sparse` and the layer in `models`: a link from a named tuple's fields is ambiguous.
suppress_warnings = ["ref.python"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields that a class's docstring describes are not objects of their own

API = Path(__file__).parent / "api"
PACKAGES = ("config", "data", "models", "ops", "sparse", "inference", "training", "evaluation", "weights", "viz")


def write_api_pages() -> None:
    API.mkdir(exist_ok=True)
    for name in PACKAGES:
        package = import_module(f"querydet_jax.{name}")
        modules = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        own = "```{eval-rst}\n.. automodule:: %s\n   :ignore-module-all:\n```\n"
        parts = [f"# {name}\n", own % package.__name__]
        for module in sorted(modules):
            if not module.endswith("__main__"):
                parts += [f"## {module}\n", own % module]
        page, text = API / f"{name}.md", "\n".join(parts)
        if not page.exists() or page.read_text() != text:  # unchanged pages need not be built again
            page.write_text(text)


def skip_tuple_fields(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples: their docstring is "Alias for field number 0"."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None


write_api_pages()


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_tuple_fields)
