"""Tables of the docs: written between marks of a page, so that a command can make them anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from smaflib import files

MARK = "<!-- {name} made by {command}: do not edit -->"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the names of the columns, and a line of cells for each row."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fill_page(page: Path, command: str, made: Mapping[str, str]) -> None:
    """Put texts between the marks of a page, in place of what was there.

    Args:
        page: a Markdown file. Around each text stand ``<!-- NAME made by COMMAND: do not edit -->`` and the same with
            ``end of NAME``.
        command: that makes them.
        made: Markdown by name.

    Raises:
        ValueError: naming the lines that a page lacks; it is left as it was.
    """
    text = page.read_text(encoding="utf-8")
    for name, markdown in made.items():
        begin, end = (MARK.format(name=which, command=command) for which in (name, f"end of {name}"))
        if begin not in text or end not in text:
            raise ValueError(f"{page} has no place for {name}: add the lines\n{begin}\n{end}")
        text = text[: text.index(begin) + len(begin)] + f"\n\n{markdown}\n\n" + text[text.index(end) :]
    files.write_text(page, text)
