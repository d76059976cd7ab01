"""What does a CRF at test time give a segmentation network? Each image's softmax once, then several CRFs on it.

    python -m benchmarks.segmentation_crf RUN IMAGES [CRF ...]

RUN is a run whose stage 07 is complete. IMAGES is ``val``, ``train``, or ``others``: every third of those that the
config's list has and the run did not learn from, for choices that validation images must not see. CRF is the name of
settings (``reference``, ``deeplab``, ``soft`` where none is named). Results go to results/segmentation_crf.json, a
record per run, images and CRF: mIoU in percent, and seconds per image, without the network's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.student_targets import EVERY, percent
from smaflib import files
from smaflib.config import CRF_PRESETS, CrfConfig, Split, load_config
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.evaluation import evaluate
from smaflib.pipeline import Workspace
from smaflib.refinement import dense_crf
from smaflib.runs import Run, find_run
from smaflib.runs.environment import git_state
from smaflib.runtime import progress
from smaflib.segmentation import class_probabilities

RESULTS = Path(__file__).parent / "results" / "segmentation_crf.json"
NO_CRF = "none"
CRFS = ("reference", "deeplab", "soft")


def label(image: Tensor, probabilities: Tensor, name: str) -> Tensor:
    """The most probable labels, after the CRF of that name.

    Args:
        image: uint8 (3, H, W).
        probabilities: (K+1, H, W), background first.
        name: of :data:`CRF_PRESETS`, or :data:`NO_CRF`.

    Returns:
        uint8 (H, W).
    """
    if name == NO_CRF:
        return probabilities.argmax(dim=0).byte()
    # A network's softmax is what a CRF at test time is made for, whatever the settings take of pseudo masks.
    return dense_crf(image, probabilities, CrfConfig(**CRF_PRESETS[name] | {"unary": "scores"}), len(probabilities))


def softmaxes(work: Workspace, samples: Samples) -> list[Tensor]:
    """A run's segmentation network on each image, float16 (K+1, H, W)."""
    runtime = work.make_runtime()
    network = runtime.place(work.segmenter())
    some = progress(samples, len(samples), "softmax")
    return [class_probabilities(network, sample.image, work.config.segmentation, runtime).half() for sample in some]


def measure(work: Workspace, samples: Samples, crfs: Sequence[str]) -> list[dict[str, Any]]:
    """A record per CRF, and one without: mIoU in percent, and seconds per image."""
    probabilities = softmaxes(work, samples)
    true: Sequence[Tensor] = ground_truth_of(samples) or []
    records = []
    for crf in (NO_CRF, *crfs):
        pairs = progress(zip(samples, probabilities, strict=True), len(samples), crf)
        begun = time.perf_counter()
        masks = [label(sample.image, softmax.float(), crf) for sample, softmax in pairs]
        seconds = (time.perf_counter() - begun) / len(samples)
        metrics = evaluate(masks, true, samples.class_names, work.config.evaluation)
        records.append({"crf": crf, "images": len(samples), "seconds_per_image": round(seconds, 3)} | percent(metrics))
    return records


def images_of(run: Run, which: str) -> Samples:
    """The images of a run's data that a word stands for."""
    if which != "others":
        split: Split = "val" if which == "val" else "train"
        return Workspace(run.folder, run.config).samples(split).with_ground_truth
    learned = set(Workspace(run.folder, run.config).samples().image_ids)
    overrides = [override for override in run.overrides if not override.startswith("data.train_split=")]
    samples = Workspace(run.folder, load_config(run.config_file, overrides)).samples().with_ground_truth
    others = [index for index, image_id in enumerate(samples.image_ids) if image_id not in learned]
    if not others:
        raise SystemExit(f"{run.name} has learned from all images of {run.config_file.name}; give val")
    return samples.subset(others[::EVERY])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name or path of a run")
    parser.add_argument("images", metavar="IMAGES", choices=("val", "train", "others"))
    names = ", ".join(CRF_PRESETS)
    parser.add_argument("crfs", metavar="CRF", nargs="*", help=f"of {names}; default: {' '.join(CRFS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.crfs) - set(CRF_PRESETS):
        parser.error(f"there are no settings {', '.join(sorted(unknown))}; there are {names}")
    run = find_run(arguments.run)
    where = {"run": run.name, "seed": run.config.seed, "split": arguments.images}
    samples = images_of(run, arguments.images)
    records = measure(Workspace(run.folder, run.config), samples, arguments.crfs or CRFS)
    measured = [where | record | git_state() for record in records]
    new = {(record["run"], record["split"], record["crf"]) for record in measured}
    kept = files.read_json(RESULTS, {"records": []})["records"]
    kept = [record for record in kept if (record["run"], record["split"], record["crf"]) not in new]
    files.write_json(RESULTS, {"records": kept + measured})
    for record in measured:
        print(record)


if __name__ == "__main__":
    main()
