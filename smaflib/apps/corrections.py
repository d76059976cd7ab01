"""What a person says about masks: the table ``corrections.csv``, and masks in ``corrected/``.

The table has the columns ``image,bg_score,leave_out``; an empty field changes nothing. No command changes either.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from smaflib import files
from smaflib.config import StageConfig
from smaflib.data.labels import Table, nearest
from smaflib.data.sample import Samples
from smaflib.errors import DataError
from smaflib.workspace import Workspace

TABLE = "corrections.csv"
COLUMNS = ("image", "bg_score", "leave_out")


class Correction(StageConfig):
    """Of one photo."""

    bg_score: Annotated[float, Field(gt=0, lt=1)] | None = None  # background threshold; None: the one for all photos
    leave_out: bool = False  # no mask, and nothing is learned from the photo


def read_corrections(out: Path, samples: Samples | None = None) -> dict[str, Correction]:
    """The table of a folder of ``smaf masks`` by image id; none without a table.

    Raises:
        DataError: names the line of a wrong value, or of a photo that ``samples`` do not have.
    """
    found = {}
    for image_id, (line, row) in Table(out / TABLE, COLUMNS).rows.items():
        where = f"{out / TABLE}, line {line}: {row['image']!r}"
        if samples is not None and image_id not in (known := samples.image_ids):
            raise DataError(f"{where} is no photo of the table of labels{nearest(image_id, known)}")
        values = {name: row[name].replace(",", ".") for name in COLUMNS[1:] if row[name]}  # 0,2 of a spreadsheet
        try:
            found[image_id] = Correction.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            raise DataError(f"{where}: {problem['loc'][0]} is {problem['input']!r}: {problem['msg']}") from error
    return found


def write_correction(out: Path, image_id: str, bg_score: float | None = None, leave_out: bool = False) -> None:
    """Write the line of one photo, both values; the other lines and columns of the table stay.

    Raises:
        ValueError: if the threshold is not in (0, 1).
        DataError: if the table cannot be read.
    """
    Correction(bg_score=bg_score, leave_out=leave_out)
    values = {"bg_score": "" if bg_score is None else f"{bg_score:g}", "leave_out": "yes" if leave_out else ""}
    Table(out / TABLE, COLUMNS).write(image_id, **values)


def check_corrected(work: Workspace, samples: Samples) -> dict[str, str]:
    """Hashes of the masks in ``corrected/`` by image id.

    Raises:
        DataError: if one belongs to no photo, cannot be read, or has another size than its photo; the message names it.
    """
    corrected, known = work.corrected(), samples.image_ids
    for path in sorted(work.path("corrected").glob("*.png")):
        if files.compose(path.stem) not in known:
            raise DataError(f"{path} belongs to no photo of the table{nearest(path.stem, known)}; rename or remove it")
    if corrected:
        corrected.with_ground_truth().check_images()
    return {each.image_id: files.file_hash(each.mask) for each in corrected.files if each.mask}
