"""Image labels from a CSV with the columns ``image,labels``; the classes of an image are joined by ``;``."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smaflib.errors import DataError
from smaflib.files import compose, read_text, write_text

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)  # there may be 100,000 of them
class LabelRow:
    """A line of the CSV: ``image`` with or without extension; no ``labels`` if it shows none of the classes."""

    line: int
    image: str
    labels: tuple[str, ...]


def read_label_rows(path: Path) -> dict[str, LabelRow]:
    """Read a CSV with the columns ``image`` and ``labels``; other columns and empty lines are ignored.

    European spreadsheets put ``;`` between the columns; there a comma separates labels, too. Returns the rows by
    :func:`image_stem`; their class names are checked by :func:`class_numbers`.
    """
    if not path.is_file():
        raise DataError(f"there is no CSV file {path}; set data.labels to a file with the columns image,labels")
    text = read_text(path)
    mark = _delimiter(text)
    reader = csv.DictReader(io.StringIO(text), strict=True, skipinitialspace=True, delimiter=mark, restval="")
    rows: dict[str, LabelRow] = {}
    try:
        reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or ()]
        if not {"image", "labels"} <= set(columns):
            raise DataError(f"{path}: the first line must be image,labels or image;labels; it is {','.join(columns)!r}")
        for fields in reader:
            line, more = reader.line_num, ", ".join(filter(str.strip, fields.pop(None, ())))
            if more:  # an unquoted delimiter between two labels would otherwise lose all but the first
                raise DataError(
                    f"{path}, line {line}: more fields than columns ({more}); separate labels by ; within quotes"
                )
            image, labels = fields["image"].strip(), fields["labels"]
            if not any(map(str.strip, fields.values())):
                continue
            if not image:
                raise DataError(f"{path}, line {line}: no image name; add it or delete the line")
            if (stem := image_stem(image)) in rows:
                before = f"{image} is already listed on line {rows[stem].line}; put all labels of an image on one line"
                raise DataError(f"{path}, line {line}: {before}, and rename images that would share {stem}.png")
            names = map(str.strip, (labels.replace(",", ";") if mark == ";" else labels).split(";"))
            rows[stem] = LabelRow(line, image, tuple(dict.fromkeys(filter(None, names))))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: {error}; check the quotes of that line") from error
    if not rows:
        raise DataError(f"{path} lists no image")
    return rows


def write_labels(path: Path, image_id: str, labels: Sequence[str]) -> None:
    """Replace the labels of one image in a table that :func:`read_label_rows` has read; all else in it stays."""
    text, bom = read_text(path), "\ufeff" if path.read_bytes().startswith(codecs.BOM_UTF8) else ""
    mark = _delimiter(text)
    rows = list(csv.reader(io.StringIO(text), skipinitialspace=True, delimiter=mark))
    columns = [name.strip().lower() for name in rows[0]]
    for row in filter(None, rows[1:]):
        row += [""] * (len(columns) - len(row))  # lines may end before the labels
        if image_stem(row[columns.index("image")].strip()) == image_id:
            row[columns.index("labels")] = ";".join(labels)
    changed = io.StringIO()
    csv.writer(changed, delimiter=mark, lineterminator="\n").writerows(rows)
    write_text(path, bom + changed.getvalue())


def _delimiter(text: str) -> str:
    head = text.partition("\n")[0].lower().translate({ord(character): None for character in ' \t\r"'})
    return ";" if {"image", "labels"} <= {*head.split(";")} else ","


def class_numbers(labels: Sequence[str], class_names: Sequence[str], where: str) -> tuple[int, ...]:
    """The class numbers, 0 to K-1 and ascending, of one image's labels; ``where`` is file and line, for the error."""
    for name in labels:
        if name not in class_names:
            known = f"{nearest(name, class_names)}; the classes are {', '.join(class_names)} (data.class_names)"
            raise DataError(f"{where}: there is no class {name!r}{known}")
    return tuple(sorted(class_names.index(name) for name in labels))


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuse class names that a CSV, a mask of 8 bits or a page cannot represent."""
    if len(class_names) > 254:
        raise DataError(f"there are {len(class_names)} classes, but a mask of 8 bits has room for 254")
    for number, name in enumerate(class_names):
        usable = 0 < len(name) <= 100 and name == name.strip() and name.isprintable()
        if not usable or any(character in name for character in ";<>$"):  # HTML and mathematics in notebooks
            raise DataError(f"data.class_names: {name[:100]!r} is unusable; use up to 100 characters, none of ; < > $")
        if name in class_names[:number]:
            raise DataError(f"data.class_names: {name!r} is given twice; the position of a name is its mask value")
        if name.lower() == "background":
            raise DataError("data.class_names: leave out 'background'; it is always mask value 0")


def image_stem(name: str) -> str:
    """The image's id: composed, without folder and extension; ``x/a.b.jpg`` and ``a.b`` are both ``a.b``."""
    name = compose(name.replace("\\", "/").rpartition("/")[2])
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in IMAGE_ENDINGS else name


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'cat'?)``, or nothing if no name is similar or begins alike (``tv``); case is ignored."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    first = name.lower()
    close = close or [other for other in by_lower if other.startswith(first) or (other[1:] and first.startswith(other))]
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
