"""Tune the CRF preset for soft scores on the mini set's training split, and report it on both splits.

    python benchmarks/soft_preset.py [--images 200]

The pretrained student's fused maps of the run that it comes from. Coordinate descent: one setting after the other moves
along its list while the others stand, until a round changes nothing. The validation split is evaluated once, at the
end.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from smaflib.config import CrfConfig, PseudoMaskConfig
from smaflib.data import load_samples, make_data
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.evaluation import evaluate
from smaflib.maps import DenoisedMaps, write_attention_maps
from smaflib.models.pretrained import pretrained_config, pretrained_network
from smaflib.pipeline import Workspace
from smaflib.pseudo_masks import pseudo_masks
from smaflib.runtime import cpu_runtime

GRID: dict[str, tuple[float, ...] | tuple[str, ...]] = {
    "sharpness": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "bilateral_compat": (2.0, 3.0, 4.0, 6.0, 8.0, 10.0),
    "bilateral_srgb": (4.0, 6.0, 8.0, 12.0, 16.0),
    "bilateral_sxy": (8.0, 14.0, 20.0, 30.0, 45.0),
    "gaussian_compat": (1.0, 2.0, 3.0, 5.0),
    "labels": ("all", "present"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="of the training split, to tune on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = pretrained_config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(config, folder)
        maps: dict[str, DenoisedMaps] = {}
        splits: dict[str, Samples] = {}
        for split in ("train", "val"):
            samples = load_samples(config, split, folder)  # type: ignore[arg-type]
            samples = samples[: arguments.images] if split == "train" else samples
            student = pretrained_network("student")
            written = write_attention_maps(student, samples, folder / split, config.attention, cpu_runtime())
            maps[split] = DenoisedMaps(written, samples, config.attention.fusion, cached=True)
            splits[split] = samples
        tuned = descend(splits["train"], maps["train"], Workspace(folder, config).bg_score)
        rows = []
        for label, params in (
            ("no refinement", None),
            ("mini, from labels", CrfConfig.model_validate("mini")),
            ("mini, from scores", CrfConfig.model_validate({"preset": "mini", "unary": "scores"})),
            ("tuned, from scores", tuned),
        ):
            row: dict[str, object] = {"settings": label}
            for split, samples in splits.items():
                row[split] = round(100 * miou(samples, maps[split], Workspace(folder, config).bg_score, params), 2)
            rows.append(row)
        print(pd.DataFrame(rows).to_string(index=False))
        print(tuned.model_dump(exclude_defaults=True))


def descend(samples: Samples, maps: Sequence[Tensor], bg_score: float) -> CrfConfig:
    best = CrfConfig.model_validate({"preset": "mini", "unary": "scores"})
    best_miou = miou(samples, maps, bg_score, best)
    while True:
        before = best
        for key, values in GRID.items():
            for value in values:
                tried = best.model_copy(update={key: value})
                if tried != best and (found := miou(samples, maps, bg_score, tried)) > best_miou:
                    best, best_miou = tried, found
                    print(f"{found:.4f}  {key} = {value}", flush=True)
        if best == before:
            return best


def miou(samples: Samples, maps: Sequence[Tensor], bg_score: float, params: CrfConfig | None) -> float:
    config = PseudoMaskConfig(refine="crf", crf=params) if params else PseudoMaskConfig(refine="none")
    masks = pseudo_masks(samples, maps, bg_score, config, desc="masks")
    return evaluate(masks, ground_truth_of(samples) or [], samples.class_names).miou


if __name__ == "__main__":
    main()
