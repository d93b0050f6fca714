"""Sphinx: Markdown pages, and the API reference from the docstrings of the installed package."""

import batchops

project = "batchops"
author = "the batchops authors"
version = release = batchops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"batchops {version}"

# Sections of a page are links: [text](page.md#section).
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more than the annotations
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False

# A reference to a name of ours that is nowhere is an error; torch's inventory would need a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|collections|contextlib|typing|types|cupy)\b.*"),
    ("py:.*", r"(bool|float|int|str|list|tuple|dict|object|None|NamedTuple|Optimizer|optional)"),
    ("py:.*", r"batchops\..*\._\w+|batchops\._optimizer\.FusedOptimizer"),  # bases, not public
]
