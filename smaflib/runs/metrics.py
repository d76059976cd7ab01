"""A run's measurements: tidy records in ``metrics.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from smaflib import files

Number = Annotated[float | None, AfterValidator(lambda number: number if math.isfinite(number or 0) else None)]
"""NaN and infinity, which are not JSON, become null."""


class Record(BaseModel):
    """A measurement and what it was taken of."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    variant: str = ""
    split: str = "train"
    scale: Number = None
    fusion: str | None = None
    object_size: Literal["all", "small", "medium", "large"] = "all"
    class_name: str = "mean"
    bg_score: Number = None
    metric: str
    value: Number  # IoU, precision, recall and accuracy in [0, 1]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.json``; none if there is no such file."""
    return files.read_json(folder / "metrics.json", [], list[Record])


def replace_records(folder: Path, stage: str, records: Iterable[dict[str, Any]]) -> None:
    """Replace a stage's records in ``metrics.json``, which is kept in pipeline order; without records it is deleted."""
    others = [record for record in read_records(folder) if record["stage"] != stage]
    if whole := [*others, *records]:
        files.write_json(folder / "metrics.json", sorted(whole, key=lambda record: record["stage"]))
    else:
        (folder / "metrics.json").unlink(missing_ok=True)
