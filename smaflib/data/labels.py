"""Image labels from a CSV: the columns ``image,labels``, the names of an image's classes joined by ``;``."""

from __future__ import annotations

import csv
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smaflib.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)  # there may be 100,000 of them
class LabelRow:
    """One line of the CSV: ``image`` as written, with or without ending; ``labels`` never empty, no name twice."""

    line: int
    image: str
    labels: tuple[str, ...]


def read_label_rows(path: Path) -> list[LabelRow]:
    """Read a CSV with the columns ``image`` and ``labels``; further columns are ignored.

    UTF-8 with or without a byte order mark, any line ends, quoted fields and spaces around names are fine; empty lines
    are skipped. Class names are not checked here, see :func:`class_numbers`.

    Raises:
        DataError: naming file, line and cure, if the file is missing, not UTF-8 or no CSV, lacks a column or has no
            rows; if a line has too many fields, no image or no label; if an image is listed twice.
    """
    if not path.is_file():
        raise DataError(f"there is no CSV file {path}; set data.labels to a file with the columns image,labels")
    header: list[str] | None = None
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True, skipinitialspace=True)
            for fields in reader:
                fields = [field.strip() for field in fields]
                if not any(fields):
                    continue
                if header is None:
                    header = _read_header(path, fields)
                else:
                    rows.append(_read_row(path, reader.line_num, fields, header))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as 'CSV UTF-8'") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes of that line") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if header is None:
        _read_header(path, [])
    if not rows:
        raise DataError(f"{path} lists no image: only the line of column names is there")
    _refuse_repetition(path, rows)
    return rows


def class_numbers(labels: Sequence[str], class_names: Sequence[str], where: str) -> tuple[int, ...]:
    """Names of classes to their numbers, 0 to K-1, in rising order.

    Args:
        labels: names of one image's classes.
        class_names: all K names, in the order of the mask values 1 to K.
        where: file and line, for the error.

    Raises:
        DataError: if a name is not among ``class_names``; the nearest one is named.
    """
    for name in labels:
        if name not in class_names:
            raise DataError(
                f"{where}: there is no class {name!r}{nearest(name, class_names)}; the classes are "
                f"{', '.join(class_names)} (data.class_names)"
            )
    return tuple(sorted({list(class_names).index(name) for name in labels}))


MOST_CLASSES = 254
"""Values of an 8-bit mask, without background and void."""

MARKUP = "<>$"
"""What tables of notebooks would take for HTML, and pictures for mathematics."""


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuse classes that no CSV could name, no mask could hold, or no page would show as they are.

    Raises:
        DataError: if there are too many, or a name is empty, too long, given twice, contains a ``;``, markup or spaces
            at its ends, or is the background.
    """
    if len(class_names) > MOST_CLASSES:
        raise DataError(
            f"there are {len(class_names)} classes, but masks of 8 bits have room for {MOST_CLASSES}; name some of "
            "them in data.class_names, or put classes together"
        )
    for number, name in enumerate(class_names):
        if len(name) > 100 or not name.isprintable() or any(character in name for character in MARKUP):
            raise DataError(
                f"data.class_names: {name[:100]!r} is no usable name; use at most 100 characters without {MARKUP} and "
                "line breaks, which pages and pictures would not show as they are"
            )
        if not name or name != name.strip() or ";" in name:
            raise DataError(f"data.class_names: {name!r} is no usable name; use one without ';' and outer spaces")
        if name in class_names[:number]:
            raise DataError(f"data.class_names: {name!r} is given twice; the place of a name is its mask value")
        if name.lower() == "background":
            raise DataError(
                "data.class_names: 'background' is no class; leave it out, it is mask value 0 by itself and has no "
                "image label"
            )


def image_stem(name: str) -> str:
    """The name of an image without its ending: ``a.b.jpg`` and ``a.b`` are both ``a.b``."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in IMAGE_ENDINGS else name


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'cat'?)`` or nothing where no name is near; capitals do not count."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def _read_header(path: Path, fields: list[str]) -> list[str]:
    header = [name.lower() for name in fields]
    if "image" not in header or "labels" not in header:
        found = repr(",".join(fields)) if fields else "an empty file"
        raise DataError(
            f"{path} must begin with a line that names the columns image,labels (between them a comma, "
            f"between the labels of one image a semicolon), found {found}"
        )
    return header


def _read_row(path: Path, line: int, fields: list[str], header: list[str]) -> LabelRow:
    where = f"{path}, line {line}"
    # An unquoted comma between two labels would otherwise lose all but the first, without a word.
    if len(fields) > len(header) and any(fields[len(header) :]):
        raise DataError(
            f"{where}: {len(fields)} fields where the first line names {len(header)} columns; "
            "join the labels of one image by ; or quote the field"
        )
    values = dict(zip(header, fields, strict=False))
    image = values.get("image", "")
    labels = tuple(
        dict.fromkeys(sys.intern(name.strip()) for name in values.get("labels", "").split(";") if name.strip())
    )
    if not image:
        raise DataError(f"{where}: there is no image name; fill it in or delete the line")
    if not labels:
        raise DataError(f"{where}: {image} is an image without a label; name what it shows or delete the line")
    return LabelRow(line, image, labels)


def _refuse_repetition(path: Path, rows: list[LabelRow]) -> None:
    first: dict[str, LabelRow] = {}
    for row in rows:
        earlier = first.setdefault(image_stem(row.image), row)
        if earlier is not row:
            cure = (
                "put all its labels on one line"
                if earlier.image == row.image
                else f"results are named {image_stem(row.image)}.png, so rename one"
            )
            raise DataError(
                f"{path}, line {row.line}: {row.image} is listed twice, before on line {earlier.line} "
                f"as {earlier.image}; {cure}"
            )
