"""Dense CRF back-ends side by side: speed, agreement, mIoU, memory; pixel-adaptive refinement beside them.

    python benchmarks/refinement.py [--photos ../shared/photos] [--device cuda] [--json refinement.json]
    python benchmarks/refinement.py --only-threads ...     one image with two threads, added to the file

All methods take turns on each image in one run, so that what else the machine does hits them alike; figures are medians
over the images. The baseline is the field's usual call: pydensecrf with all 21 labels, on one core. Without --photos,
images of the mini set are drawn at the same size. Labels and scores imitate attention: masks on a coarse grid, with
noise. Figures in results/refinement.json become the tables of docs/refinement.md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from smaflib.config import CRF_PRESETS, CrfConfig, ParConfig, load_config
from smaflib.data import load_samples, make_data
from smaflib.data.classes import VOC_CLASSES
from smaflib.data.masks import read_mask
from smaflib.data.voc import read_image
from smaflib.evaluation import evaluate
from smaflib.files import PROJECT_ROOT, read_json, write_json
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import (
    dense_crf,
    dense_crf_batch,
    mean_field,
    pixel_adaptive_refinement,
    pydensecrf_backend,
    refine_many,
)
from smaflib.refinement.lattice import gaussian_filter
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state
from smaflib.runtime import num_cores, progress

RESULTS, PAGE = PROJECT_ROOT / "benchmarks" / "results" / "refinement.json", PROJECT_ROOT / "docs" / "refinement.md"
LONGEST_SIDE = 500
NUM_LABELS = len(VOC_CLASSES) + 1
BG_SCORE = 0.35
REFERENCE = CrfConfig()

Case = tuple[Tensor, Tensor, Tensor]
"""Image, mask, and attention-like maps of the 20 classes."""


def load_cases(photos: Path | None, num: int) -> list[Case]:
    pairs = list(_photos(photos, num) if photos else _drawn(num))
    return [(image, mask, attention_like(mask, seed)) for seed, (image, mask) in enumerate(pairs)]


def _photos(folder: Path, num: int) -> Iterator[tuple[Tensor, Tensor]]:
    for path in sorted((folder / "JPEGImages").glob("*.jpg"))[:num]:
        image, mask = read_image(path), read_mask(folder / "SegmentationClass" / f"{path.stem}.png")
        scale = LONGEST_SIDE / max(mask.shape)
        size = [round(side * scale) for side in mask.shape]
        small = functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        yield small.round().clamp(0, 255).to(torch.uint8), _nearest(mask, size)


def _drawn(num: int) -> Iterator[tuple[Tensor, Tensor]]:
    settings = [f"data.num_train={num}", "data.num_val=1", f"data.image_size={LONGEST_SIDE}"]
    config = load_config(PROJECT_ROOT / "configs" / "mini.yaml", settings)
    with tempfile.TemporaryDirectory() as folder:
        make_data(config, Path(folder))
        for sample in load_samples(config, "train", Path(folder)).with_masks():
            assert sample.mask is not None
            yield sample.image, sample.mask


def _nearest(mask: Tensor, size: list[int]) -> Tensor:
    return functional.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].to(torch.uint8)


def attention_like(mask: Tensor, seed: int) -> Tensor:
    """Maps (20, H, W) in [0, 1], as blurred and wrong as attention: class shares of cells of 16 pixels, with noise."""
    generator = torch.Generator().manual_seed(seed)
    shown = [label for label in range(1, NUM_LABELS) if bool((mask == label).any())]
    maps = torch.zeros(NUM_LABELS - 1, *mask.shape)
    for label in shown:
        coarse = functional.adaptive_avg_pool2d((mask == label).float()[None], [max(1, s // 16) for s in mask.shape])
        coarse = coarse + 0.25 * torch.randn(coarse.shape, generator=generator)
        fine = functional.interpolate(coarse[None], mask.shape, mode="bicubic")[0, 0].clamp(min=0)
        maps[label - 1] = fine / fine.max().clamp(min=1e-5)
    return maps


# --- speed --------------------------------------------------------------------------------------------------------


def unmerged(labels: Tensor, num_labels: int) -> Tensor:
    """Energies of hard labels, one channel for each of them: what the field's usual call computes."""
    rest = (1 - REFERENCE.gt_prob) / (num_labels - 1)
    held = labels == torch.arange(num_labels, device=labels.device)[:, None, None]
    return torch.where(held, -np.log(REFERENCE.gt_prob), -np.log(rest)).float()


def methods(device: str) -> dict[str, tuple[int, Callable[[Case], Tensor]]]:
    """By name: torch's threads and the call; each starts from hard labels or scores and ends with a mask."""

    def usual(backend: str, num_labels: int) -> Callable[[Case], Tensor]:
        def call(case: Case) -> Tensor:
            image, _, maps = case
            energies = unmerged(hard_labels(maps, BG_SCORE) % num_labels, num_labels)
            counts = torch.ones(num_labels)
            if backend == "pydensecrf":
                result = pydensecrf_backend.mean_field(image, energies, counts, REFERENCE)
            else:
                mean_field._smoothness_kernel.cache_clear()  # sizes differ from photo to photo
                result = mean_field.mean_field([image], [energies], [counts], REFERENCE)[0]
            return result.argmax(dim=0).to(torch.uint8)

        return call

    def merged(backend: Any) -> Callable[[Case], Tensor]:
        def call(case: Case) -> Tensor:
            mean_field._smoothness_kernel.cache_clear()
            return dense_crf(case[0], hard_labels(case[2], BG_SCORE), REFERENCE, NUM_LABELS, backend, device)

        return call

    def par(case: Case) -> Tensor:
        scores = with_background_score(case[2], BG_SCORE)
        shown = scores.flatten(1).any(dim=1).nonzero()[:, 0]
        image, scores = case[0].to(device), scores[shown].to(device)
        return shown[pixel_adaptive_refinement(image, scores, ParConfig()).argmax(dim=0).cpu()].to(torch.uint8)

    table: dict[str, tuple[int, Callable[[Case], Tensor]]] = {}
    if pydensecrf_backend.INSTALLED:
        table["pydensecrf, 21 labels"] = (1, usual("pydensecrf", NUM_LABELS))
        table["pydensecrf, 3 labels"] = (1, usual("pydensecrf", 3))
        table["pydensecrf, 21 labels, absent ones merged"] = (1, merged("pydensecrf"))
    if device == "cpu":
        table["torch, 21 labels"] = (1, usual("torch", NUM_LABELS))
        table["torch, 3 labels"] = (1, usual("torch", 3))
        table["torch, 3 labels, 2 threads"] = (2, usual("torch", 3))
    table[f"torch, 21 labels, absent ones merged ({device})"] = (1, merged("torch"))
    table[f"pixel-adaptive refinement ({device})"] = (1, par)
    return table


def measure_speed(cases: list[Case], device: str, repeats: int) -> list[dict[str, Any]]:
    chosen = methods(device)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    masks: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for case in progress(cases, total=len(cases), desc="speed"):
        best: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(repeats):
            for name, (threads, call) in chosen.items():
                torch.set_num_threads(threads)
                start = time.perf_counter()
                mask = call(case)
                best[name].append(time.perf_counter() - start)
                if len(best[name]) == 1:
                    masks[name].append(mask)
        for name, values in best.items():
            seconds[name].append(min(values))
    torch.set_num_threads(1)
    baseline = next(iter(chosen))
    three = "pydensecrf, 3 labels"
    rows = []
    for name in chosen:
        labels = three if "3 labels" in name else baseline
        different = sum(int((a != b).sum()) for a, b in zip(masks[name], masks[labels], strict=True))
        pixels = sum(mask.numel() for mask in masks[name])
        row = {
            "method": name,
            "ms": 1000 * statistics.median(seconds[name]),
            "speed": ratio(seconds[baseline], seconds[name]),
            "speed at as many labels": ratio(seconds[labels], seconds[name]),
        }
        if "adaptive" not in name:
            row |= {"same pixels, %": 100 * (1 - different / pixels), "different pixels": different}
        if "3 labels" not in name:
            row["mIoU"] = miou(masks[name], cases)
        rows.append(row)
    before = [hard_labels(maps, BG_SCORE) for _, _, maps in cases]
    return [{"method": "not refined", "mIoU": miou(before, cases)}, *rows]


def ratio(one: list[float], other: list[float]) -> float:
    """How many times as fast the other is: the median over the images."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def miou(masks: list[Tensor], cases: list[Case]) -> float:
    return 100 * evaluate(masks, [mask for _, mask, _ in cases], VOC_CLASSES).miou


def measure_threads(cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """One image after the other: smaflib's torch call with one thread and with two, beside the field's usual call.

    *kept*: the lattice of positions is there already, as from the second image of a size on.
    """
    usual = methods("cpu")["pydensecrf, 21 labels"][1]

    def torch_call(case: Case, kept: bool) -> Tensor:
        if not kept:
            mean_field._smoothness_kernel.cache_clear()
        return dense_crf(case[0], hard_labels(case[2], BG_SCORE), REFERENCE, NUM_LABELS, "torch")

    calls: dict[str, tuple[int, Callable[[Case], Tensor]]] = {"pydensecrf, 21 labels": (1, usual)}
    for threads, kept in itertools.product((1, 2), (False, True)):
        name = f"torch, {threads} thread{'s' if threads > 1 else ''}{', kept' if kept else ''}"
        calls[name] = threads, functools.partial(torch_call, kept=kept)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    different = dict.fromkeys(calls, 0)
    for case in progress(cases, total=len(cases), desc="threads"):
        expected = usual(case)
        for name, (threads, call) in calls.items():
            torch.set_num_threads(threads)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                mask = call(case)
                times.append(time.perf_counter() - start)
            seconds[name].append(min(times))
            different[name] += int((mask != expected).sum())
    torch.set_num_threads(1)
    baseline = next(iter(calls))
    return [
        {
            "method": name,
            "ms": 1000 * statistics.median(seconds[name]),
            "speed": ratio(seconds[baseline], seconds[name]),
            "different pixels": different[name],
        }
        for name in calls
    ]


# --- agreement ----------------------------------------------------------------------------------------------------


def measure_agreement(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """Every preset, from labels and from scores: pixels in which torch differs from pydensecrf, and mIoU."""
    rows = []
    for name in CRF_PRESETS:
        for unary in ("labels", "scores"):
            params = CrfConfig.model_validate({"preset": name, "unary": unary})
            different, pixels, masks = 0, 0, []
            for image, _, maps in progress(cases, total=len(cases), desc=f"agreement, {name}, {unary}"):
                soft = unary == "scores"
                given = with_background_score(maps, BG_SCORE) if soft else hard_labels(maps, BG_SCORE)
                masks.append(dense_crf(image, given, params, NUM_LABELS, "torch", device))
                theirs = dense_crf(image, given, params, NUM_LABELS, "pydensecrf")
                different += int((masks[-1] != theirs).sum())
                pixels += theirs.numel()
            rows.append(
                {
                    "preset": name,
                    "from": unary,
                    "different pixels": different,
                    "of": pixels,
                    "same, %": 100 * (1 - different / pixels),
                    "mIoU": miou(masks, cases),
                }
            )
    return rows


# --- memory -------------------------------------------------------------------------------------------------------


def measure_memory(photos: Path | None, device: str) -> list[dict[str, Any]]:
    """Peak memory of one image's refinement, each method in a process of its own."""
    rows = []
    for name in methods(device):
        command = [sys.executable, __file__, "--device", device, "--memory-of", name]
        command += ["--photos", str(photos)] if photos else []
        out = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
        rows.append({"method": name, "peak MB": float(out.split()[-1])})
    return rows


def memory_of(name: str, photos: Path | None, device: str) -> float:
    (case,) = load_cases(photos, 1)
    torch.set_num_threads(1)
    small = tuple(part[..., :32, :32].contiguous() for part in case)
    call = methods(device)[name][1]
    call(small)  # imports, thread pools, CUDA contexts
    if device != "cpu" and "pydensecrf" not in name:
        torch.cuda.reset_peak_memory_stats()
        call(case)
        return torch.cuda.max_memory_allocated() / 2**20
    # The peak so far may be that of the imports: fill up to it, so that all above is the method's.
    unit = 1024 if sys.platform != "darwin" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ballast = np.ones(max(0, before - now) // 8)
    call(case)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del ballast
    return (after - before) / 2**20


# --- a whole data set ---------------------------------------------------------------------------------------------


def synthetic(num: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of 160 x 200 pixels with a disc each, and its label with noise."""
    y, x = torch.meshgrid(torch.arange(160), torch.arange(200), indexing="ij")
    for index in range(num):
        generator = torch.Generator().manual_seed(index)
        row, column, radius = (int(torch.randint(40, 120, (1,), generator=generator)) for _ in range(3))
        disc = (y - row).square() + (x - column).square() < (radius // 2) ** 2
        noise = torch.randint(0, 40, (3, 160, 200), generator=generator)
        blocks = torch.rand(10, 13, generator=generator).repeat_interleave(16, 0).repeat_interleave(16, 1)[:, :200]
        yield (disc * 140 + noise).to(torch.uint8), (disc ^ (blocks > 0.85)).to(torch.uint8)


def measure_data_set(num: int) -> list[dict[str, Any]]:
    """One process against one per core, in turns; and whether memory grows."""
    list(refine_many(synthetic(8), REFERENCE, NUM_LABELS, 2))  # the workers start once
    seconds: dict[int, list[float]] = {1: [], 2: []}
    memory: list[int] = []
    part = num // 4
    for _ in range(4):
        for workers in seconds:
            start = time.perf_counter()
            for _mask in refine_many(synthetic(part), REFERENCE, NUM_LABELS, workers):
                if workers == 1:
                    memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            seconds[workers].append(time.perf_counter() - start)
    resolved = memory[len(memory) // 10]
    return [
        {
            "images": 4 * part,
            "images/s, 1 process": 4 * part / sum(seconds[1]),
            "images/s, 2 processes": 4 * part / sum(seconds[2]),
            "ratio": ratio(seconds[1], seconds[2]),
            "memory grows by, MB": (max(memory) - resolved) / 2**20,
        }
    ]


# --- where the time goes ------------------------------------------------------------------------------------------


def measure_parts(cases: list[Case], device: str, batch: int) -> list[dict[str, Any]]:
    """Building and one iteration's steps, each by itself, against moving the same bytes (caches can be faster)."""
    place = torch.device(device)
    images = [cases[index % len(cases)][0].to(place) for index in range(batch)]
    channels = 3
    lattice = mean_field.join([mean_field.appearance_kernel(image, REFERENCE) for image in images])
    values = torch.rand(len(lattice.vertices), channels, device=place)
    logits = torch.rand(channels, len(values), device=place)
    num_vertices = lattice.neighbors.shape[1]
    touched = functional.embedding_bag  # the three steps of gaussian_filter, one by one

    splatted = {"mode": "sum", "per_sample_weights": lattice.splat_weights, "include_last_offset": True}
    of_vertices = torch.rand(num_vertices, channels, device=place)
    entries, width = lattice.points.numel(), 4 * channels
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "build": (lambda: [mean_field.appearance_kernel(image, REFERENCE) for image in images], 0),
        "splat": (lambda: touched(lattice.points, values, lattice.bags[0], **splatted), entries * (8 + width)),
        "blur": (
            lambda: [of_vertices.add(touched(pair, of_vertices, mode="sum"), alpha=0.5) for pair in lattice.neighbors],
            len(lattice.neighbors) * num_vertices * (8 + 4 * width),
        ),
        "slice": (
            lambda: touched(lattice.vertices, of_vertices, mode="sum", per_sample_weights=lattice.slice_weights),
            entries * (8 + width),
        ),
        "softmax": (lambda: torch.softmax(logits, dim=0), 2 * logits.numel() * 4),
        "one filtering": (lambda: gaussian_filter(lattice, values), 0),
    }
    large = torch.rand(2**26, device=place)
    copied = seconds_of(lambda: large.clone(), place)
    bandwidth = 2 * large.numel() * 4 / copied
    rows = []
    for name, (call, moved) in steps.items():
        taken = seconds_of(call, place)
        limit = 1000 * moved / bandwidth / batch
        row: dict[str, Any] = {"step": name, "images at once": batch, "ms per image": 1000 * taken / batch}
        if moved:
            row |= {
                "ms if memory were all": limit,
                "share of bandwidth, %": 100 * limit * batch / (1000 * taken),
            }
        rows.append(row)
    return rows


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_batches(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """Whole masks per image by batch size, against pydensecrf on one core in the same run."""
    rows = []
    images = [case[0] for case in cases]
    labels = [hard_labels(case[2], BG_SCORE) % 3 for case in cases]
    start = time.perf_counter()
    theirs = [dense_crf(i, x, REFERENCE, 3, "pydensecrf") for i, x in zip(images, labels, strict=True)]
    baseline = (time.perf_counter() - start) / len(images)
    on_device = [(image.to(device), label.to(device)) for image, label in zip(images, labels, strict=True)]

    def refine_all(size: int) -> list[Tensor]:
        batches = (zip(*on_device[first : first + size], strict=True) for first in range(0, len(images), size))
        return [mask for batch in batches for mask in dense_crf_batch(*batch, REFERENCE, 3, "torch", device)]

    for size in (1, 4, 8, 16, 32):
        masks = refine_all(size)
        taken = seconds_of(functools.partial(refine_all, size), torch.device(device), 5) / len(images)
        different = sum(int((a.cpu() != b).sum()) for a, b in zip(masks, theirs, strict=True))
        pixels = sum(mask.numel() for mask in theirs)
        rows.append(
            {
                "images at once": size,
                "ms per image": 1000 * taken,
                "times pydensecrf": baseline / taken,
                "same pixels, %": 100 * (1 - different / pixels),
            }
        )
    return rows


# --- the page -----------------------------------------------------------------------------------------------------

SHOWN = {
    "pydensecrf, 21 labels": "pydensecrf, 21 labels: the field's usual call",
    "pydensecrf, 21 labels, absent ones merged": "**pydensecrf, absent labels merged: smaflib's call on a CPU**",
    "torch, 21 labels, absent ones merged (cpu)": "torch, absent labels merged",
    "torch, 21 labels": "torch, 21 labels",
    "pixel-adaptive refinement (cpu)": "pixel-adaptive refinement, labels of the photo",
    "pydensecrf, 3 labels": "*3 labels:* pydensecrf",
    "torch, 3 labels": "*3 labels:* torch",
    "torch, 3 labels, 2 threads": "*3 labels:* torch, 2 threads",
}
"""The page's words for the methods of a CPU."""


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The page's tables: speed and memory of each method, what agrees, and mIoU by preset."""
    facts, speed = result["facts"], {row["method"]: row for row in result["speed"]}
    memory = {row["method"]: row["peak MB"] for row in result["memory"]}
    lines = []
    for name, label in SHOWN.items():
        row = speed[name]
        different = f"{row['different pixels']:,}" if "different pixels" in row else ""
        lines.append(
            [label, f"{row['ms']:.0f}", f"{row['speed at as many labels']:.2f}", different, f"{memory[name]:.0f}"]
        )
    head = [f"{facts['images']} photos, longest side {facts['longest side']}, preset `reference`"]
    head += ["ms an image", "speed, at as many labels", "pixels that differ", "peak memory, MB"]
    return {
        "speed": f"{markdown_table(head, lines)}\n\n{_agreement(result)}\n\n{_source(facts)}",
        "threads": _threads(result["threads"]),
        "quality": _quality(result["agreement"], speed),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON, and the tables of the page where it is the one that the page is made of."""
    write_json(path, result)
    if path.absolute() == RESULTS:
        fill_page(PAGE, "benchmarks/refinement.py", tables(result))


def _threads(part: dict[str, Any]) -> str:
    lines = [
        [row["method"], f"{row['ms']:.0f}", f"{row['speed']:.1f}", f"{row['different pixels']:,}"]
        for row in part["rows"]
    ]
    head = [f"{part['facts']['images']} photos, preset `reference`", "ms an image", "speed", "pixels that differ"]
    return f"{markdown_table(head, lines)}\n\n{_source(part['facts'])}"


def _agreement(result: dict[str, Any]) -> str:
    different, pixels = (sum(row[key] for row in result["agreement"]) for key in ("different pixels", "of"))
    (whole,) = result["data set"]
    return (
        f"Over all presets, from labels and from scores, {different:,} of {pixels / 1e6:.0f} million pixels differ. "
        f"Two processes refine {whole['images']:,} synthetic images {whole['ratio']:.2f} times as fast as one; memory "
        f"grows by {whole['memory grows by, MB']:.1f} MB meanwhile."
    )


def _source(facts: dict[str, Any]) -> str:
    return (
        f"`{facts['command']}`: all methods in turns, medians over the photos, one thread unless said; "
        f"{facts['cores']} cores, torch {facts['torch']}, {facts['date']}, commit `{facts['git_commit'][:8]}`."
    )


def _quality(agreement: list[dict[str, Any]], speed: dict[str, dict[str, Any]]) -> str:
    presets = list(dict.fromkeys(row["preset"] for row in agreement))
    miou_of = {(row["from"], row["preset"]): f"{row['mIoU']:.1f}" for row in agreement}
    beside = {"labels": "", "scores": f"{speed['pixel-adaptive refinement (cpu)']['mIoU']:.1f}"}
    lines = [
        [f"from {unary}", f"{speed['not refined']['mIoU']:.1f}", *(miou_of[unary, each] for each in presets), adaptive]
        for unary, adaptive in beside.items()
    ]
    return markdown_table(["", "before", *(f"`{each}`" for each in presets), "pixel-adaptive"], lines)


# --- all of it ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="VOC layout: JPEGImages, SegmentationClass")
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu or cuda")
    parser.add_argument("--images", type=int, default=40, help="at most so many")
    parser.add_argument("--repeats", type=int, default=3, help="turns per image; the fastest counts")
    parser.add_argument("--data-set", type=int, default=2000, metavar="N", help="synthetic images; 0: leave out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--only-threads", action="store_true", help="one image with two threads; the rest stays")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, arguments.photos, arguments.device))
        return
    if not pydensecrf_backend.INSTALLED:
        parser.error("pydensecrf is the baseline and is not installed; install pydensecrf2")
    torch.set_num_threads(1)
    cases = load_cases(arguments.photos, arguments.images)
    facts = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        **git_state(),
        "cores": num_cores(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else None,
        "torch": torch.__version__,
        "images": len(cases),
        "longest side": LONGEST_SIDE,
    }
    if arguments.only_threads:
        rows = measure_threads(cases, arguments.repeats)
        print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))
        if arguments.json:
            write_result(arguments.json, read_json(arguments.json, {}) | {"threads": {"facts": facts, "rows": rows}})
        return
    measured = {
        "speed": measure_speed(cases, arguments.device, arguments.repeats),
        "agreement": measure_agreement(cases, arguments.device),
        "memory": measure_memory(arguments.photos, arguments.device),
    }
    if arguments.data_set:
        measured["data set"] = measure_data_set(arguments.data_set)
    if arguments.device == "cpu":
        measured["parts"] = measure_parts(cases, "cpu", 1)
    else:
        measured["batches"] = measure_batches(cases, arguments.device)
        measured["parts"] = [row for n in (1, 8, 32) for row in measure_parts(cases, arguments.device, n)]
    if arguments.json:
        kept = {"threads": part} if (part := read_json(arguments.json, {}).get("threads")) else {}
        write_result(arguments.json, {"facts": facts, **measured} | kept)
    for name, rows in measured.items():
        print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False, na_rep='', float_format='{:.4g}'.format)}")
    print(f"\n{json.dumps(facts)}")


if __name__ == "__main__":
    main()
