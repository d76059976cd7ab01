"""Executed notebooks as HTML that loads nothing from a network."""

from html import escape
from pathlib import Path

import jinja2
import nbformat
from latex2mathml.converter import convert as latex_to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import TagRemovePreprocessor


def notebook_body(notebook: Path) -> str:
    """An executed notebook as HTML without code: its text, its formulas as MathML, its outputs.

    Cells tagged ``check`` are left out, since a page takes no answers. The heading above a picture becomes its
    description.
    """
    document, heading = nbformat.read(notebook, as_version=4), "figure"
    for cell in document.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.partition("\n")[0].strip("# ")
        cell.metadata.setdefault("alt", heading)
    hidden = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": _markdown_to_html}, **hidden)
    exporter.register_preprocessor(TagRemovePreprocessor(remove_cell_tags={"check"}, enabled=True))
    return exporter.from_notebook_node(document)[0]


@jinja2.pass_context
def _markdown_to_html(context: jinja2.runtime.Context, source: str) -> str:
    attachments = context.get("cell", {}).get("attachments", {})
    renderer = _WithMathML(escape=False, exclude_anchor_links=True, attachments=attachments)
    return MarkdownWithMath(renderer).render(source)


class _WithMathML(IPythonRenderer):
    """Formulas as MathML; one that cannot be parsed stays LaTeX."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        try:
            mathml = latex_to_mathml(body.strip(), display=display)
        except Exception:  # the parser raises many kinds
            return f"<code>{escape(body.strip())}</code>"
        return mathml.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")

    def block_math(self, body: str) -> str:
        return self.inline_math(body, display="block")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")
