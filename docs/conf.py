"""The documentation site: ``make docs``. Nothing is fetched while it is built or read."""

import sys
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from smaflib import __version__  # noqa: E402
from tools.docs_pages import mathml, write_pages  # noqa: E402

project, author, version = "smaflib", "smaflib developers", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "badges"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks come executed, from the reference run
nb_ipywidgets_js = {}  # from a network otherwise; the notebooks hold no widgets
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
html_theme = "pydata_sphinx_theme"
html_title = "smaflib"
html_math_renderer = "mathml"
html_show_sourcelink = False
html_static_path, html_css_files = ["_static"], ["site.css"]
html_sidebars = {"index": [], "start": []}  # pages without others below them: their list would be empty
html_theme_options = {"show_prev_next": True, "navigation_depth": 2, "footer_start": ["copyright"], "footer_end": []}
suppress_warnings = ["myst.xref_missing", "mystnb.unknown_mime_type"]


def _math(display):
    def visit(self, node):
        self.body.append(mathml(node.astext(), display))
        raise nodes.SkipNode

    return visit


def _no_type(app, what, name, obj, options, lines):
    # napoleon takes what stands before the first colon of a constant's text for its type.
    if what in ("data", "attribute") and lines:
        lines[0] = lines[0].replace(": ", " - ", 1)


def setup(app):
    """Called by Sphinx before the build."""
    app.connect("autodoc-process-docstring", _no_type, priority=400)
    app.add_html_math_renderer("mathml", (_math("inline"), None), (_math("block"), None))
    write_pages(ROOT / "docs" / "generated")
