"""A run's measurements: tidy records in ``metrics.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from smaflib import files

RECORD_DEFAULTS: dict[str, Any] = {
    "stage": "",
    "variant": "",
    "split": "train",
    "scale": None,
    "fusion": None,
    "object_size": "all",
    "class_name": "mean",
    "bg_score": None,
    "metric": None,
    "value": None,
}
OBJECT_SIZES = ("all", "small", "medium", "large")
FRACTIONS = ("iou", "iou_sweep", "precision", "recall", "accuracy")


class StoredRecord(BaseModel):
    """The keys of a stored record that tables rely on."""

    model_config = ConfigDict(strict=True)

    stage: str
    variant: str = ""
    split: str = ""
    scale: float | None = None
    fusion: str | None = None
    object_size: str = ""
    class_name: str = ""
    bg_score: float | None = None
    metric: str | None = None
    value: float | None = None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.json``; none if there is no such file."""
    records: list[dict[str, Any]] = files.read_json(folder / "metrics.json", [], list[StoredRecord])
    return records


def replace_records(folder: Path, stage: str, records: Iterable[dict[str, Any]]) -> None:
    """Replace a stage's records in ``metrics.json``, which is kept in pipeline order; without records it is deleted."""
    others = [record for record in read_records(folder) if record["stage"] != stage]
    if whole := [*others, *records]:
        files.write_json(folder / "metrics.json", sorted(whole, key=lambda record: record["stage"]))
    else:
        (folder / "metrics.json").unlink(missing_ok=True)


def checked_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its defaults filled in; :meth:`smaflib.runs.run.Run.record` says what is refused."""
    if unknown := sorted(set(record) - set(RECORD_DEFAULTS)):
        raise ValueError(f"a record has no {', '.join(unknown)}; its keys are {', '.join(RECORD_DEFAULTS)}")
    if absent := sorted({"metric", "value"} - set(record)):
        raise ValueError(f"a record needs {' and '.join(absent)}, got {record}")
    full = RECORD_DEFAULTS | record
    if full["object_size"] not in OBJECT_SIZES:
        raise ValueError(f"object_size must be one of {', '.join(OBJECT_SIZES)}, got {full['object_size']!r}")
    for key in ("scale", "bg_score", "value"):
        number = math.nan if full[key] is None else float(full[key])
        full[key] = number if math.isfinite(number) else None  # NaN is not JSON
    if full["metric"] in FRACTIONS and full["value"] is not None and not 0 <= full["value"] <= 1:
        raise ValueError(f"{full['metric']} must lie in [0, 1], got {full['value']}; percent only where printed")
    return full
