"""Which targets should a student learn? Students of one teacher, each with other settings, evaluated alike.

    python benchmarks/student_targets.py RUN "teacher:" "CRF: self_training.refine=crf" "control: control"

RUN is a run whose stages 01 to 03 are complete. A variant is a name, a colon and settings; the word ``control`` stands
for targets of a single scale. A name that is ``teacher``, ``student`` or ``student_control``, up to a comma, trains
nothing: it evaluates that network of the run ("student, no saliency: pseudo_masks.saliency_weight=0"). Results go to
results/student_targets.json, a record per run and variant: mIoU of fused maps and of masks after the CRF, on every
third image of the training split, at the background score that ``auto`` gives and at the oracle threshold. Trained
networks and maps are kept.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

from smaflib import files
from smaflib.config import load_config
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.evaluation import SIZES, SegmentationMetrics, best_threshold, evaluate, mean_over_classes, sweep_thresholds
from smaflib.maps import write_attention_maps
from smaflib.pipeline import Targets, Workspace, auto_bg_score, train_student
from smaflib.pseudo_masks import pseudo_masks
from smaflib.runs import Run, find_run
from smaflib.runs.environment import git_state

RESULTS = Path(__file__).parent / "results" / "student_targets.json"
FINISHED = ("teacher", "student", "student_control")
EVERY = 3
"""One image in so many is evaluated; the others are kept from the choice of settings."""


def percent(metrics: SegmentationMetrics) -> dict[str, float]:
    values = {"mIoU": metrics.miou} | {size: mean_over_classes(metrics.iou_of_size(size)) for size in SIZES}
    return {name: round(100 * value, 2) for name, value in values.items() if value == value}  # NaN: no such object


def score(work: Workspace, network: str, samples: Samples) -> dict[str, Any]:
    """Fused maps, and masks after the CRF, at the score that auto gives and at the oracle threshold."""
    true, names = ground_truth_of(samples) or [], samples.class_names
    maps = work.maps(network)
    write_attention_maps(work.network(network), samples, maps.folder, work.config.attention, work.make_runtime())
    fused, for_masks = work.denoised(network, samples), work.mask_maps(network, samples)
    sweep = sweep_thresholds(fused, true, names, work.config.evaluation)
    mask_sweep = sweep_thresholds(for_masks, true, names, work.config.evaluation)
    best_of_maps, oracle, auto = (
        best_threshold(sweep),
        best_threshold(mask_sweep),
        auto_bg_score(work, for_masks, samples),
    )
    single = {}
    for scale in work.config.attention.scales:
        of_scale = sweep_thresholds(work.denoised(network, samples, [scale]), true, names, work.config.evaluation)
        single[f"{scale:g}"] = percent(of_scale[best_threshold(of_scale)])
    refined = {}
    for bg_score in sorted({oracle, auto}):
        masks = pseudo_masks(samples, for_masks, bg_score, work.config.pseudo_masks, desc=f"{network} {bg_score:g}")
        refined[bg_score] = percent(evaluate(masks, true, names, work.config.evaluation))
    best = max(refined, key=lambda bg_score: refined[bg_score]["mIoU"])
    return {
        "scales": single,
        "fused": percent(sweep[best_of_maps]) | {"bg_score": best_of_maps},
        "refined_auto": refined[auto] | {"bg_score": auto},
        "refined_oracle": refined[best] | {"bg_score": best},
    }


def variant(run: Run, text: str) -> dict[str, Any]:
    """Train the student of a variant of a run's settings and evaluate it."""
    name, _, settings = text.partition(":")
    words = settings.split()
    control = "control" in words
    overrides = [word for word in words if word != "control"]
    work = Workspace(run.folder, load_config(run.config_file, [*run.overrides, *overrides]))
    finished = name.split(",")[0].strip() if name.split(",")[0].strip() in FINISHED else None
    network = finished or "tried_" + re.sub(r"\W+", "_", name.strip())
    begun = time.monotonic()
    if not finished:
        train_student(work, network, targets=Targets(fused=not control))
    seconds = time.monotonic() - begun
    samples = work.samples().with_ground_truth
    result = score(work, network, samples.subset(range(0, len(samples), EVERY)))
    return {"variant": name.strip(), "control": control, "settings": overrides, "seconds": round(seconds), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name or path of a run")
    parser.add_argument("variants", nargs="+", metavar="NAME:SETTINGS", help="'teacher:' trains nothing")
    arguments = parser.parse_args()
    run = find_run(arguments.run)
    for text in arguments.variants:
        kept = files.read_json(RESULTS, {"records": []})["records"]
        where = {"run": run.name, "seed": run.config.seed, "run_settings": run.shown_overrides}
        record = where | variant(run, text) | git_state()
        same = [r for r in kept if (r["run"], r["variant"]) == (record["run"], record["variant"])]
        files.write_json(RESULTS, {"records": [r for r in kept if r not in same] + [record]})
        print(record["variant"], record["fused"], record["refined_auto"], record["refined_oracle"], flush=True)


if __name__ == "__main__":
    main()
