"""How far is a background score that was chosen without ground truth from the oracle threshold?

    python benchmarks/bg_score.py papermill_runs/mini papermill_runs/mini-seed1 ...

For teacher and student of each run: the oracle threshold (the score that is best on the ground truth), its mIoU, and
what each criterion loses against it. The criteria read attention maps, one of them saliency maps, too; masks serve the
evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from smaflib.config import Config
from smaflib.data.sample import Samples
from smaflib.evaluation import sweep_thresholds
from smaflib.maps import AttentionMaps, FusedMaps, SaliencyMaps
from smaflib.reactivation import hard_labels
from smaflib.runs import find_run
from smaflib.runtime import progress
from smaflib.thresholds import CANDIDATES, choose_bg_score, separation

Criterion = Callable[[Tensor, list[Tensor]], list[float]]


def otsu(denoised: Tensor, per_scale: list[Tensor]) -> list[float]:
    return separation(denoised).tolist()


def scale_agreement(denoised: Tensor, per_scale: list[Tensor]) -> list[float]:
    """Cohen's kappa between the masks of single scales and of the fused maps; plain agreement would favour one mask
    that is all foreground."""
    values = []
    for threshold in CANDIDATES:
        fused = hard_labels(denoised, threshold)
        values.append(sum(kappa(hard_labels(maps, threshold), fused) for maps in per_scale) / len(per_scale))
    return values


def stability(denoised: Tensor, per_scale: list[Tensor]) -> list[float]:
    """How little the foreground changes around a score: its area 0.05 above as a share of that 0.05 below (the idea of
    maximally stable regions, Matas et al., 2002)."""
    scores, values = denoised.amax(dim=0), []
    for threshold in CANDIDATES:
        larger = float((scores > threshold - 0.05).float().mean())
        values.append(float((scores > threshold + 0.05).float().mean()) / larger if larger else 0.0)
    return values


def kappa(one: Tensor, other: Tensor) -> float:
    """Cohen's kappa of two masks, uint8 (H, W); 0 where both hold one and the same label: that says nothing."""
    size = int(max(one.max(), other.max())) + 1
    joint = torch.bincount(one.flatten().long() * size + other.flatten(), minlength=size * size).double()
    joint = joint.view(size, size) / one.numel()
    chance = float(joint.sum(dim=0) @ joint.sum(dim=1))
    return 0.0 if chance == 1 else (float(joint.diagonal().sum()) - chance) / (1 - chance)


PAPERS = 0.2
"""The reference code's score."""

CRITERIA: dict[str, Criterion] = {
    "separation (Otsu)": otsu,
    "agreement of scales": scale_agreement,
    "stability of area": stability,
}


def choose(criterion: Criterion, maps: AttentionMaps, samples: Samples, config: Config) -> float:
    fused = FusedMaps(maps, samples, config.attention.fusion)
    singles = [FusedMaps(maps, samples, "sum", [scale]) for scale in maps.scales]
    totals = torch.zeros(len(CANDIDATES), dtype=torch.float64)
    for index in progress(range(len(samples)), total=len(samples), desc=criterion.__name__):
        values = criterion(fused[index], [single[index] for single in singles])
        totals += torch.tensor(values, dtype=torch.float64)
    return CANDIDATES[int(totals.argmax())]


def rows_of(name: str, max_images: int) -> list[dict[str, object]]:
    run = find_run(name)
    config, samples = run.config, run.samples("train").annotated
    some = samples.subset(range(0, len(samples), max(1, -(-len(samples) // max_images))))
    rows = []
    for role in ("teacher", "student"):
        maps = AttentionMaps(run.path("cams", role), config.attention.scales)
        limits = config.evaluation.model_copy(update={"thresholds": CANDIDATES})
        denoised = FusedMaps(maps, samples, config.attention.fusion)
        sweep = sweep_thresholds(denoised, samples.ground_truth or [], samples.class_names, limits)
        miou = {threshold: 100 * scores.miou for threshold, scores in sweep.items()}
        best = max(miou, key=lambda threshold: miou[threshold])
        row: dict[str, object] = {"run": run.name, "maps": role, "best score": best, "mIoU": round(miou[best], 1)}
        for label, criterion in CRITERIA.items():
            chosen = choose(criterion, maps, some, config)
            row[label] = f"{miou[chosen] - miou[best]:+.1f} at {chosen}"
        if some.has_saliency:
            fused = FusedMaps(maps, some, config.attention.fusion)
            chosen = choose_bg_score(fused, SaliencyMaps(some))
            row["agreement with saliency"] = f"{miou[chosen] - miou[best]:+.1f} at {chosen}"
        row[f"fixed {PAPERS}"] = f"{miou[PAPERS] - miou[best]:+.1f}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names or paths of finished runs on data with masks")
    parser.add_argument("--max-images", type=int, default=100, help="the criteria read as many, evenly over the split")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = pd.DataFrame([row for name in arguments.runs for row in rows_of(name, arguments.max_images)])
    print(table.to_string(index=False))
