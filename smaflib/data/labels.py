"""Tables of images that people edit, and image labels from the columns ``image,labels``, joined by ``;``."""

import codecs
import csv
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smaflib.errors import DataError
from smaflib.files import compose, read_text, write_text

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class LabelRow(NamedTuple):
    """A line of the CSV: ``image`` with or without extension; no ``labels`` if it shows none of the classes."""

    line: int
    image: str
    labels: tuple[str, ...]


def read_label_rows(path: Path) -> dict[str, LabelRow]:
    """Read a CSV with the columns ``image`` and ``labels``; other columns and empty lines are ignored.

    Where ``;`` separates the columns, a comma separates labels, too.

    Returns:
        The rows by :func:`image_stem`. Their class names are checked by :func:`class_numbers`.
    """
    if not path.is_file():
        raise DataError(f"there is no CSV file {path}; set data.labels to a file with the columns image,labels")
    table = Table(path, ("image", "labels"))
    if not table.rows:
        raise DataError(f"{path} lists no image")
    rows = {}
    for stem, (line, values) in table.rows.items():
        labels = re.split("[;,]" if table.delimiter == ";" else ";", values["labels"])
        names = tuple(dict.fromkeys(name.strip() for name in labels if name.strip()))
        rows[stem] = LabelRow(line, values["image"], names)
    return rows


class Table:
    """A CSV with a line per image; European spreadsheets put ``;`` between the columns. No file: no rows.

    Attributes:
        rows: number of the line and values by column, of each image by :func:`image_stem`.

    Raises:
        DataError: if one of ``columns`` is missing, or a line cannot be read.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        text = read_text(path) if path.is_file() else ",".join(columns)
        head = re.sub(r'[ \t\r"]', "", text.partition("\n")[0])
        marks = [mark for mark in ",;" if {*columns} <= {*head.lower().split(mark)}]
        if not marks:
            raise DataError(
                f"{path}: the first line must name the columns {','.join(columns)}, separated by a comma (labels of "
                f"one image by a semicolon) or the other way round; it is {head!r}"
            )
        self.path, self.delimiter, self.rows = path, marks[0], dict[str, tuple[int, dict[str, str]]]()
        reader = csv.DictReader(io.StringIO(text), strict=True, skipinitialspace=True, delimiter=self.delimiter)
        self.head = reader.fieldnames or []
        names = [name.strip().lower() for name in self.head]
        # Columns without a name, or with the same one, are kept apart.
        self.columns = [f"{name} {number}" if name in names[:number] else name for number, name in enumerate(names)]
        reader.fieldnames = self.columns
        try:
            for fields in reader:
                self._add(f"{path}, line {reader.line_num}", reader.line_num, fields)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: {error}; check the quotes of that line") from error

    def _add(self, where: str, line: int, fields: dict[str | None, Any]) -> None:
        # An unquoted delimiter between two labels would otherwise lose all but the first.
        if extra := [field for field in fields.pop(None, ()) if field.strip()]:
            more = f"more fields than columns ({', '.join(extra)})"
            raise DataError(f"{where}: {more}; separate labels by ; within quotes")
        values = {str(name): (value or "").strip() for name, value in fields.items()}
        stem = image_stem(values["image"])
        if stem in self.rows:
            raise DataError(
                f"{where}: {values['image']} is already listed on line {self.rows[stem][0]}; put all of an image on "
                f"one line, and rename images that differ in their extension only: masks are named {stem}.png"
            )
        if stem:
            self.rows[stem] = (line, values)
        elif any(values.values()):
            raise DataError(f"{where}: no image name; add it or delete the line")

    def write(self, image_id: str, **values: str) -> None:
        """Write the file with other values for one image, whose line is added if there is none; the rest stays."""
        _, row = self.rows.setdefault(image_id, (0, {"image": image_id}))
        row |= values
        bom = "\ufeff" if self.path.is_file() and self.path.read_bytes().startswith(codecs.BOM_UTF8) else ""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, delimiter=self.delimiter, lineterminator="\n")
        writer.writerow(dict(zip(self.columns, self.head, strict=True)))
        writer.writerows(row for _, row in self.rows.values())
        write_text(self.path, bom + text.getvalue())


def write_labels(path: Path, image_id: str, labels: Sequence[str]) -> None:
    """Replace the labels of one image in a table; all else in it stays."""
    Table(path, ("image", "labels")).write(image_id, labels=";".join(labels))


def class_numbers(labels: Sequence[str], class_names: Sequence[str], where: str) -> tuple[int, ...]:
    """The class numbers, 0 to K-1 and ascending, of one image's labels; ``where`` is file and line, for the error."""
    for name in labels:
        if name not in class_names:
            raise DataError(
                f"{where}: there is no class {name!r}{nearest(name, class_names)}; the classes are "
                f"{', '.join(class_names)} (data.class_names)"
            )
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
