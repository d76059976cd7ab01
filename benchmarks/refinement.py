"""Dense CRF back-ends side by side: speed, agreement, mIoU; pixel-adaptive refinement beside them.

    python benchmarks/refinement.py [--photos ../shared/photos] [--device cuda] [--json refinement.json]

All methods take turns on each image, so that the load of the machine affects them alike; figures are medians over the
images. The baseline is the field's usual call: pydensecrf with all 21 labels, on one core. Without --photos, images of
the mini set are drawn at the same size. Labels and scores imitate attention: masks on a coarse grid, with noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from smaflib.files import PROJECT_ROOT, write_json
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import crf, dense_crf, mean_field, refine
from smaflib.runtime import progress

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
        nearest = functional.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0]
        yield small.round().clamp(0, 255).to(torch.uint8), nearest.to(torch.uint8)


def _drawn(num: int) -> Iterator[tuple[Tensor, Tensor]]:
    settings = [f"data.num_train={num}", "data.num_val=1", f"data.image_size={LONGEST_SIDE}"]
    config = load_config(PROJECT_ROOT / "configs" / "mini.yaml", settings)
    with tempfile.TemporaryDirectory() as folder:
        make_data(config, Path(folder))
        for sample in load_samples(config, "train", Path(folder)).with_ground_truth():
            assert sample.mask is not None
            yield sample.image, sample.mask


def attention_like(mask: Tensor, seed: int) -> Tensor:
    """Maps (20, H, W) in [0, 1], as blurred and wrong as attention: class shares of cells of 16 pixels, with noise."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(NUM_LABELS - 1, *mask.shape)
    for label in range(1, NUM_LABELS):
        shown = mask == label
        if shown.any():
            coarse = functional.adaptive_avg_pool2d(shown.float()[None], [max(1, side // 16) for side in mask.shape])
            coarse = coarse + 0.25 * torch.randn(coarse.shape, generator=generator)
            fine = functional.interpolate(coarse[None], mask.shape, mode="bicubic")[0, 0].clamp(min=0)
            maps[label - 1] = fine / fine.max().clamp(min=1e-5)
    return maps


def unmerged(labels: Tensor, num_labels: int) -> Tensor:
    """Energies of hard labels, one channel for each of them: what the field's usual call computes."""
    rest = torch.tensor((1 - REFERENCE.gt_prob) / (num_labels - 1))
    held = labels == torch.arange(num_labels, device=labels.device)[:, None, None]
    return torch.where(held, -torch.tensor(REFERENCE.gt_prob).log(), -rest.log())


def methods(device: str) -> dict[str, Callable[[Case], Tensor]]:
    """By name; each starts from hard labels or scores and ends with a mask."""

    def usual(infer: Callable[..., Tensor]) -> Callable[[Case], Tensor]:
        def call(case: Case) -> Tensor:
            mean_field.smoothness_kernel.cache_clear()  # sizes differ from photo to photo
            energies = unmerged(hard_labels(case[2], BG_SCORE), NUM_LABELS)
            return infer(case[0], energies, torch.ones(NUM_LABELS), REFERENCE).argmax(dim=0).to(torch.uint8)

        return call

    def merged(backend: Any) -> Callable[[Case], Tensor]:
        def call(case: Case) -> Tensor:
            mean_field.smoothness_kernel.cache_clear()
            return dense_crf(case[0], hard_labels(case[2], BG_SCORE), REFERENCE, NUM_LABELS, backend, device)

        return call

    def par(case: Case) -> Tensor:
        scores = with_background_score(case[2], BG_SCORE)
        return refine(case[0], scores, ParConfig(), NUM_LABELS, device=torch.device(device))

    return {
        "pydensecrf, 21 labels": usual(crf.pydensecrf_mean_field),
        "pydensecrf, absent labels merged": merged("pydensecrf"),
        **({"torch, 21 labels": usual(mean_field.mean_field)} if device == "cpu" else {}),
        f"torch, absent labels merged ({device})": merged("torch"),
        f"pixel-adaptive refinement ({device})": par,
    }


def measure_speed(cases: list[Case], device: str, repeats: int) -> list[dict[str, Any]]:
    chosen = methods(device)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    masks: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for case in progress(cases, total=len(cases), desc="speed"):
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(repeats):
            for name, call in chosen.items():
                start = time.perf_counter()
                mask = call(case)
                times[name].append(time.perf_counter() - start)
            masks[name].append(mask)
        for name, values in times.items():
            seconds[name].append(min(values))
    baseline = next(iter(chosen))
    before = [hard_labels(maps, BG_SCORE) for _, _, maps in cases]
    rows: list[dict[str, Any]] = [{"method": "not refined", "mIoU": miou(before, cases)}]
    for name in chosen:
        speeds = [one / other for one, other in zip(seconds[baseline], seconds[name], strict=True)]
        row = {"method": name, "ms": 1000 * statistics.median(seconds[name]), "speed": statistics.median(speeds)}
        if "adaptive" not in name:
            row["different pixels"] = different_pixels(masks[name], masks[baseline])
        rows.append(row | {"mIoU": miou(masks[name], cases)})
    return rows


def different_pixels(masks: list[Tensor], others: list[Tensor]) -> int:
    return sum(int((one != other).sum()) for one, other in zip(masks, others, strict=True))


def miou(masks: list[Tensor], cases: list[Case]) -> float:
    return 100 * evaluate(masks, [mask for _, mask, _ in cases], VOC_CLASSES).miou


def measure_agreement(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """Every preset, from labels and from scores: pixels in which torch differs from pydensecrf, and mIoU."""
    rows = []
    images = [image for image, _, _ in cases]
    for name in CRF_PRESETS:
        for unary in ("labels", "scores"):
            params = CrfConfig.model_validate({"preset": name, "unary": unary})
            start = hard_labels if unary == "labels" else with_background_score
            given = [start(maps, BG_SCORE) for _, _, maps in cases]
            pairs = list(zip(images, given, strict=True))
            ours = [dense_crf(image, each, params, NUM_LABELS, "torch", device) for image, each in pairs]
            theirs = [dense_crf(image, each, params, NUM_LABELS, "pydensecrf") for image, each in pairs]
            different, pixels = different_pixels(ours, theirs), sum(mask.numel() for mask in theirs)
            row = {"preset": name, "from": unary, "different pixels": different, "of": pixels}
            rows.append(row | {"mIoU": miou(ours, cases)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="VOC layout: JPEGImages, SegmentationClass")
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu or cuda")
    parser.add_argument("--images", type=int, default=40, help="at most so many")
    parser.add_argument("--repeats", type=int, default=3, help="turns per image; the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = load_cases(arguments.photos, arguments.images)
    measured = {
        "speed": measure_speed(cases, arguments.device, arguments.repeats),
        "agreement": measure_agreement(cases, arguments.device),
    }
    for name, rows in measured.items():
        print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False, na_rep='', float_format='{:.4g}'.format)}")
    if arguments.json:
        write_json(arguments.json, {"images": len(cases), "torch": torch.__version__, **measured})


if __name__ == "__main__":
    main()
