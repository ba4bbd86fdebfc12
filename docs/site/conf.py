"""The documentation site: the pages as they are, and the reference of what `import quantflow`
gives, from its docstrings. `make docs` builds it; a warning is an error."""

from typing import Any

from pygments.lexers.special import TextLexer

import quantflow

project, author = "QuantFlow", "the QuantFlow developers"
copyright = author  # what Sphinx calls it
version = release = quantflow.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Built from the repository's root, so that links between pages hold wherever they lie.
include_patterns = [
    "*.md", "docs/**", "recipes/README.md", "notebooks/README.md", "benchmarks/LOG.md",
    "calib_data/README.md",
]  # fmt: skip
root_doc = "docs/index"
html_theme = "furo"
html_title = "QuantFlow"
html_additional_pages = {"index": "to_index.html"}
templates_path = ["."]

myst_heading_anchors = 4
# a page may lie in no table of contents: others link to it
suppress_warnings = ["toc.not_included"]

autodoc_typehints = "none"  # signatures have them already
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_attr_annotations = False
napoleon_use_ivar = True


def setup(app: Any) -> None:
    """Public names are shown as they are imported, and the source of a diagram as it is."""
    app.add_lexer("mermaid", TextLexer)
    for name in quantflow.__all__:
        getattr(quantflow, name).__module__ = "quantflow"
