"""What attention maps cost beside the bare forward passes of their networks, which have random weights.

    python -m benchmarks.cost OUT.json [--repeats N]

One image of 512 x 512 pixels at the scales 0.5, 0.75 and 1, without mirror images, on one thread; maps and bare passes
alternate. Ratios are medians over the repeats. CAA refines maps of 32 x 32 patches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

from smaflib.cams import class_attention
from smaflib.data.classes import VOC_CLASSES
from smaflib.files import write_json
from smaflib.runs.environment import git_state
from smaflib.sources import AttentionSource, as_source
from smaflib.sources.caa import refine_by_affinity
from smaflib.sources.clip import ClipSource, ClipVision
from smaflib.sources.gradcam import GradCamSource
from smaflib.sources.imagenet import ImageNetClassifier, ImageNetSource, match_classes
from smaflib.sources.vit import VitSource

SIDES = (256, 384, 512)


def make_sources(vision: ClipVision) -> dict[str, tuple[AttentionSource, Callable[[Tensor], Any]]]:
    """Each source and the bare forward pass of its network; of CLIP, all blocks of its vision transformer."""
    num = len(VOC_CLASSES)
    classifier = ImageNetClassifier()
    imagenet = ImageNetSource(classifier, [*match_classes(VOC_CLASSES).values()])
    gradcam = GradCamSource(classifier, classifier.features, imagenet.scores, "gradcam", imagenet.supervision)
    deit = timm.create_model("deit_small_patch16_224", dynamic_img_size=True).eval()
    rollout = VitSource(timm.create_model("deit_small_patch16_224", dynamic_img_size=True), num, rollout=True)
    found: dict[str, tuple[AttentionSource, Callable[[Tensor], Any]]] = {
        "classifier": (as_source(classifier), classifier.model),
        "imagenet": (imagenet, classifier.model),
        "gradcam": (gradcam, classifier.model),
        "vit-rollout": (rollout, deit),
    }
    texts, words = torch.randn(num, 512), torch.randn(24, 512)
    for name in ("clip-es", "sclip", "naclip"):
        found[name] = ClipSource(vision, texts, words, 100.0, name), lambda images: vision_pass(vision, images)
    return found


def vision_pass(vision: ClipVision, images: Tensor) -> Tensor:
    tokens, _ = vision.embed(images[0], "bilinear")
    for block in vision.blocks:
        tokens = block(tokens[None])[0]
    return vision.project(tokens)


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    views = [torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in SIDES]
    vision = ClipVision(open_clip.create_model("ViT-B-16-quickgelu").eval().visual)
    rows = []
    for name, (source, bare) in make_sources(vision).items():
        for classes in ([0], [0, 1, 2]):

            def passes(bare: Callable[[Tensor], Any] = bare) -> None:
                with torch.no_grad():
                    for view in views:
                        bare(view)

            def maps(source: AttentionSource = source, classes: list[int] = classes) -> None:
                for view in views:
                    class_attention(source, view, [classes], flip=False)

            seconds(passes), seconds(maps)
            pairs = [(seconds(maps), seconds(passes)) for _ in range(args.repeats)]
            ratio = statistics.median(made / plain for made, plain in pairs)
            rows.append({"source": name, "classes": len(classes), "maps / passes": round(ratio, 3)})
            print(rows[-1], flush=True)
    cams, affinity = torch.rand(1, 32, 32), torch.rand(1024, 1024)
    pairs = []
    with torch.no_grad():
        for _ in range(args.repeats):
            refined = seconds(lambda: refine_by_affinity(cams, affinity))
            pairs.append((refined, seconds(lambda: vision_pass(vision, views[-1]))))
    caa = round(statistics.median(refined / plain for refined, plain in pairs), 3)
    print("CAA / pass of ViT-B/16:", caa)
    write_json(args.out, {"command": f"python -m benchmarks.cost {args.out}", **git_state(), "rows": rows, "caa": caa})


if __name__ == "__main__":
    main()
