"""How good are the labels that ``smaf masks`` drafts? Precision, recall and F1 by class, on photos with known labels.

    python -m benchmarks.drafts PHOTOS

PHOTOS is a folder with ``JPEGImages`` and ``labels.csv`` in VOC's classes. Drafted names beside VOC's do not count. On
the first half of the table F0.5, which prefers precision, would choose 0.05; :data:`PROBABLE` is 0.1, since the names
that do not count are mostly wrong. Scores are those of the second half; both halves have been looked at.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smaflib import files
from smaflib.apps.drafts import PROBABLE, coarse_names
from smaflib.data.classes import VOC_CLASSES
from smaflib.data.labels import read_label_rows
from smaflib.data.voc import open_image
from smaflib.runs.environment import git_state
from smaflib.sources.imagenet import ImageNetClassifier, match_classes

RESULTS = Path(__file__).parent / "results" / "drafts.json"
THRESHOLDS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


def scores_of(drafted: Tensor, true: Tensor) -> dict[str, Any]:
    """Of labels in {0, 1}, any shape: in %; zero where nothing was drafted."""
    hits, guesses, labels = (int(each.sum()) for each in (drafted & true, drafted, true))
    values = {"precision": hits / max(guesses, 1), "recall": hits / max(labels, 1), "F1": 2 * hits / (guesses + labels)}
    return {name: round(100 * value, 1) for name, value in values.items()} | {"labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", metavar="PHOTOS", type=Path)
    folder = parser.parse_args().photos
    rows = [*read_label_rows(folder / "labels.csv").values()]
    network, begun = ImageNetClassifier(), time.process_time()
    found = torch.stack([network.probabilities(open_image(folder / "JPEGImages" / row.image)) for row in rows])
    seconds = (time.process_time() - begun) / len(rows)
    numbers = {name: [*each] for name, each in match_classes(VOC_CLASSES).items()}
    known = [name for name in VOC_CLASSES if numbers[name]]
    scores = torch.stack([found[:, numbers[name]].sum(dim=1) for name in known], dim=1)
    true = torch.tensor([[name in row.labels for name in known] for row in rows])
    half, choice = len(rows) // 2, []
    for threshold in THRESHOLDS:
        drafted = scores[:half] >= threshold
        weighted = 125 * int((drafted & true[:half]).sum()) / float(drafted.sum() + 0.25 * true[:half].sum())
        choice.append({"threshold": threshold} | scores_of(drafted, true[:half]) | {"F0.5": round(weighted, 2)})
    drafted, true = scores[half:] >= PROBABLE, true[half:]
    classes = {name: scores_of(drafted[:, k], true[:, k]) for k, name in enumerate(known)}
    seen = [each for each in classes.values() if each["labels"]]
    mean = {name: round(sum(each[name] for each in seen) / len(seen), 1) for name in ("precision", "recall", "F1")}
    named = torch.stack([found[half:, each].sum(dim=1) for each in coarse_names().values()], dim=1) >= PROBABLE
    result = {"command": "python -m benchmarks.drafts ../shared/coco_small", "threshold": PROBABLE, "choice": choice}
    result |= {"not known": [name for name in VOC_CLASSES if not numbers[name]], "photos": len(rows) - half}
    result |= {"classes": classes, "mean": mean, "all labels": scores_of(drafted, true)}
    result |= {"names per photo": float(named.sum(dim=1).float().mean()), "names": int(named.any(dim=0).sum())}
    files.write_json(RESULTS, result | {"seconds per photo, one core": round(seconds, 3)} | git_state())


if __name__ == "__main__":
    main()
