"""What a chain costs that nobody has run here: hours, memory, disk and traffic, computed from what was measured.

    python benchmarks/scaling.py            docs/scaling.md's tables of the cost model
    python benchmarks/scaling.py --disk RUN the bytes of a photo's maps and mask, of a finished run, into the results

The rates are those of results/gpu.json, one GPU and one process; sizes of files are a run's on photos. Everything else
is multiplication, and said beside the tables. Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smaflib import files
from smaflib.config import Config, load_config
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.manifest import read_manifest
from smaflib.runs.run import find_run

RESULTS = Path(__file__).parent / "results" / "scaling.json"
GPU = Path(__file__).parent / "results" / "gpu.json"
PAGE = files.PROJECT_ROOT / "docs" / "scaling.md"
CORES, CORES_SEED = files.PROJECT_ROOT / "docs" / "voc12_small.json", 1
"""Runs on photos; seed 0 took its teacher over from an earlier run, so its stages look shorter than they are."""

VOC_PASSES = 20_000 * 8 / 10_582
"""How often the paper's training sees each photo of VOC."""

MEASURED_SCALES = (0.5, 1.0, 1.5, 2.0)
MEASURED_STRIDE, MEASURED_CLASSES = 16, 20
"""Of the run that ``--disk`` reads: its maps have a cell for 16 x 16 pixels and a map for each of VOC's classes."""

GPUS_OF_A_MACHINE = 8
Rates = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A data set on some GPUs.

    Attributes:
        name: as people read it.
        photos: to learn from.
        val: that the segmentation network is judged on; they have attention maps, too.
        classes: K.
        preset: of ``configs/``.
        gpus: of one kind, eight to a machine.
        passes: of each training over the photos, where the preset's iterations are for another number; None: these.
    """

    name: str
    photos: int
    val: int
    classes: int
    preset: str
    gpus: int
    passes: float | None = None

    @property
    def of_one_machine(self) -> int:
        return min(self.gpus, GPUS_OF_A_MACHINE)


CASES = (
    Case("VOC train_aug", 10_582, 1_449, 20, "voc12", 1),
    Case("VOC train_aug", 10_582, 1_449, 20, "voc12", 8),
    Case("COCO train2014", 82_783, 40_504, 80, "coco14", 8),
    Case("COCO train2014", 82_783, 40_504, 80, "coco14", 64),
    Case("a million photos", 1_000_000, 0, 20, "voc12", 8, VOC_PASSES),
    Case("a million photos", 1_000_000, 0, 20, "voc12", 64, VOC_PASSES),
)


def rates_of(gpu: Mapping[str, Any], config: Config) -> Rates:
    """What one GPU does in a second, of the rows for a preset's networks and precision.

    Args:
        gpu: of results/gpu.json.
        config: the preset.

    Returns:
        ``maps`` (photos, one at a time, since photos have many sizes), ``segmenter maps`` (the same with the
        segmentation network's backbone), ``host`` (photos that one thread resizes), ``train`` and ``segmenter train``
        (images), ``crf`` (photos), ``train GB`` and ``maps GB`` (of the GPU's memory).
    """
    segmenter = (config.segmentation.model or config.model).backbone

    def row(part: str, **wanted: Any) -> Mapping[str, Any]:
        rows: list[Mapping[str, Any]] = gpu[part]["rows"]
        return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))

    def maps(backbone: str) -> Mapping[str, Any]:
        return row("maps", **{"backbone": backbone, "precision": config.precision, "images at once": 1})

    def train(backbone: str, crop: int) -> Mapping[str, Any]:
        return row("training", backbone=backbone, precision=config.precision, crop=crop)

    own, other = maps(config.model.backbone), maps(segmenter)
    learned = train(config.model.backbone, config.classifier.crop_size)
    segmented = train(segmenter, config.segmentation.crop_size)
    crf = row("crf", **{"labels": 3, "images at once": 1})["ms an image, labels that do not occur merged"]
    return {
        "maps": own["photos a second"],
        "maps GB": own["memory, GB"],
        "host": own["the host resizes"],
        "segmenter maps": other["photos a second"],
        "train": learned["images a second"],
        "train GB": learned["memory, GB"],
        "segmenter train": segmented["images a second"],
        "crf": 1000 / crf,
    }


def gpu_seconds(case: Case, config: Config, rates: Rates) -> dict[str, float]:
    """Seconds of one GPU by stage and kind of work."""

    def images(settings: Any) -> float:
        return settings.iterations * settings.batch_size if case.passes is None else case.passes * case.photos

    segmentation = config.segmentation
    # A step sees the batch at each scale; its cost is that of the pixels.
    steps = sum(scale**2 for scale in segmentation.loss_scales)
    views = sum(scale**2 for scale in segmentation.test_scales) / sum(scale**2 for scale in MEASURED_SCALES)
    all_maps = (case.photos + case.val) / rates["maps"]
    return {
        "02 training": images(config.classifier) / rates["train"],
        "03 maps": all_maps,
        "05 training": images(config.self_training) / rates["train"],
        "05 maps": all_maps,
        "06 masks": case.photos / rates["crf"],
        "07 training": images(segmentation) * steps / rates["segmenter train"],
        "07 masks": case.val * (views / rates["segmenter maps"] + 1 / rates["crf"]),
    }


def hours(case: Case, seconds: Mapping[str, float], trainings_gain: bool) -> dict[str, float]:
    """Hours by stage: shards share stages 03 and 06 over all GPUs, processes the others over those of one machine.

    Args:
        case: how many GPUs.
        seconds: of one GPU, from :func:`gpu_seconds`.
        trainings_gain: whether a training is faster by the number of processes, or not at all.
    """
    found: dict[str, float] = {}
    for what, taken in seconds.items():
        shared = case.gpus if what[:2] in ("03", "06") else case.of_one_machine
        if what.endswith("training") and not trainings_gain:
            shared = 1
        found[what] = taken / shared / 3600
    return found


def disk(case: Case, config: Config, sizes: Mapping[str, float]) -> dict[str, float]:
    """Files, gigabytes that stay, and gigabytes that cross a network if the run folder lies on a file server.

    Args:
        case: how many photos and classes.
        config: the preset: the stride, and which photos a training reads.
        sizes: bytes of a photo's maps and of a mask, from ``--disk``.
    """
    finer = (MEASURED_STRIDE / config.model.output_stride) ** 2
    maps = sizes["maps"] * finer * case.classes / MEASURED_CLASSES
    photos = case.photos + case.val
    written = 2 * photos * maps + photos * sizes["mask"]
    training = config.self_training
    seen = training.iterations * training.batch_size if case.passes is None else case.passes * case.photos
    read = seen * maps + case.photos * maps  # the student's targets; the masks
    return {"files": 3 * photos, "GB": written / 1e9, "traffic GB": (written + read) / 1e9}


# --------------------------------------------------------------------------------------------------------------- table


def precise(number: float) -> str:
    """Two digits: more than that the model does not know."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def tables(gpu: Mapping[str, Any], sizes: Mapping[str, float]) -> dict[str, str]:
    """The page's tables by name."""
    time, space, rate = [], [], []
    for case in CASES:
        config = load_config(files.SHIPPED / "configs" / f"{case.preset}.yaml")
        rates = rates_of(gpu, config)
        seconds = gpu_seconds(case, config, rates)
        best, worst = (hours(case, seconds, trainings_gain=gain) for gain in (True, False))
        parts = [
            "-".join(dict.fromkeys(precise(sum(of[what] for what in stages)) for of in (best, worst)))
            for stages in (["02 training"], ["03 maps"], ["05 training", "05 maps"], ["06 masks"], [*seconds][-2:])
        ]
        total = "-".join(dict.fromkeys(precise(sum(of.values())) for of in (best, worst)))
        time.append([f"{case.name}, {case.gpus} GPU{'s' * (case.gpus > 1)}", *parts, f"**{total}**"])
        if case.gpus == max(other.gpus for other in CASES if other.name == case.name):
            need = disk(case, config, sizes)
            space.append([case.name, f"{need['files']:,}", *(precise(need[key]) for key in ("GB", "traffic GB"))])
        rate.append((config.model.backbone, config.precision, rates))
    backbone, precision, rates = rate[0]
    lines = [
        ["attention maps, photos a second, one at a time", f"{rates['maps']:.1f}", f"{rates['maps GB']:.1f}"],
        ["training, images a second, crops of 448", f"{rates['train']:.1f}", f"{rates['train GB']:.1f}"],
        ["training the segmentation network, images a second, crops of 321", f"{rates['segmenter train']:.1f}", ""],
        ["dense CRF, photos a second", f"{rates['crf']:.1f}", ""],
        ["a thread of the host resizes, photos a second", f"{rates['host']:.1f}", ""],
        ["threads that resize for one GPU", f"{rates['maps'] / rates['host']:.1f}", ""],
    ]
    return {
        "rates": markdown_table([f"one GPU, {backbone}, {precision}", "", "GPU's memory, GB"], lines),
        "hours": markdown_table(["", "02", "03", "05", "06", "07", "all, hours"], time),
        "cores": cores_table(files.read_json(CORES, {})["runs"]),
        "disk": markdown_table(["", "files", "run folder, GB", "traffic of maps and masks, GB"], space),
    }


def cores_table(runs: Mapping[str, Any]) -> str:
    """Stages of a run of docs/voc12_small.json, as measured."""
    found = [run for run in runs.values() if run["kind"] == "chain" and run["seed"] == CORES_SEED]
    stages = {name: entry for name, entry in found[0]["stages"].items() if name >= "02"}
    lines = [[n, f"{e['seconds'] / 60:.0f}", f"{e['peak_memory_mb'] / 1000:.1f}"] for n, e in stages.items()]
    return markdown_table(["stage", "minutes", "memory, GB"], lines)


def read_disk(name: str) -> dict[str, Any]:
    """Bytes of a photo's maps and of a mask, of a run whose stages 03, 05 and 06 are complete."""
    run = find_run(name)
    stages = read_manifest(run.folder)["stages"]
    maps = stages["03_multi_scale_attention"]["artifacts"]["cams/teacher/"]
    masks = stages["06_pseudo_masks"]["artifacts"]["masks/"]
    facts = {"run": run.name, "backbone": run.config.model.backbone, "photos": maps["files"]}
    if run.config.model.output_stride != MEASURED_STRIDE or run.config.attention.scales != MEASURED_SCALES:
        raise SystemExit(f"the maps of {name} have another stride or other scales than this model reckons with")
    return facts | {"maps": maps["bytes"] / maps["files"], "mask": masks["bytes"] / masks["files"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", metavar="RUN", help="name or path of a finished run on photos of VOC")
    arguments = parser.parse_args()
    if arguments.disk:
        files.write_json(RESULTS, {"disk": read_disk(arguments.disk)})
    made = tables(files.read_json(GPU, {}), files.read_json(RESULTS, {})["disk"])
    fill_page(PAGE, "benchmarks/scaling.py", made)


if __name__ == "__main__":
    main()
