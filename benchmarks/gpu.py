"""What one GPU does in a second: attention maps, training images and dense CRF, with random weights.

    python benchmarks/gpu.py --photos VOC2012/JPEGImages
    python benchmarks/gpu.py --device cpu --quick          the same on a CPU, to see that it runs

A few minutes on a GPU. Times are medians of calls that fill ``--seconds``, after two warm-up calls; the device is
synchronised before and after each. Without ``--photos``, images of noise at several scales are drawn.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg, read_file, read_image, write_file
from torchvision.transforms.v2.functional import resize

from smaflib.cams import class_attention
from smaflib.config import AttentionConfig, CrfBackend, CrfConfig, ModelConfig
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.data.views import views_of
from smaflib.maps import write_attention_maps
from smaflib.models.networks import AttentionNetwork
from smaflib.refinement import dense_crf
from smaflib.runtime import Runtime, keep_freed_memory
from smaflib.sources import as_source

BACKBONES = ("timm/tf_efficientnet_lite2", "timm/resnet101.tv_in1k", "resnet38")
CROPS = (321, 448, 512)
TRAINED_AT_ONCE = 8
SCALES = (0.5, 1.0, 1.5, 2.0)
PHOTO = (375, 500)
LABELS = (3, 5, 21)

Row = dict[str, Any]


class Clock:
    """Times calls on a device, and measures the memory that they take."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median seconds of a call, and the peak of a GPU's memory in GB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(2):
            call()
        start, times = time.perf_counter(), list[float]()
        while len(times) < 3 or time.perf_counter() - start < self.seconds:
            self.wait()
            before = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - before)
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else float("nan")
        return statistics.median(times), memory


def photos_of(folder: Path | None, number: int) -> list[Tensor]:
    """uint8 (3, H, W) each."""
    if folder is not None:
        paths = sorted(folder.glob("*.jpg"))[:number]
        return [resize(read_image(str(path), ImageReadMode.RGB), list(PHOTO), antialias=True) for path in paths]
    drawn = [torch.rand(number, 3, 3 * side, 4 * side) for side in (1, 4, 16, 64)]
    smooth = [F.interpolate(noise, size=PHOTO, mode="bilinear") for noise in drawn]
    return list((255 * torch.stack(smooth).mean(dim=0)).to(torch.uint8))


def network_of(backbone: str, runtime: Runtime) -> AttentionNetwork:
    torch.manual_seed(0)
    stride = 8 if backbone == "resnet38" else 16
    config = ModelConfig(backbone=backbone, output_stride=stride, weights=None, freeze_batch_norm=True)
    return runtime.place(AttentionNetwork(config, num_classes=20, background=True))


def measure_maps(backbones: Sequence[str], runtimes: Sequence[Runtime], clock: Clock) -> Iterator[Row]:
    """Maps at four scales with mirror images, from tensors on the host to maps on the host."""
    for backbone, runtime, number in itertools.product(backbones, runtimes, (1, 4)):
        network = network_of(backbone, runtime).eval()
        views = [view.expand(number, -1, -1, -1) for view in views_of(photos_of(None, 1)[0], SCALES)]

        def maps(network: nn.Module = network, runtime: Runtime = runtime, views: list[Tensor] = views) -> list[Tensor]:
            source = as_source(network)
            return [class_attention(source, view.to(clock.device), [], True, runtime).cpu() for view in views]

        taken, memory = clock.time(maps)
        names = {"backbone": backbone, "precision": runtime.precision, "photos at once": number}
        yield names | {"photos a second": number / taken, "memory, GB": memory}


def read_sample(files: SampleFiles, num_classes: int) -> Sample:
    return Sample(files.image_id, decode_jpeg(read_file(str(files.image))), torch.ones(num_classes))


def measure_split(backbone: str, runtime: Runtime, photos: Sequence[Tensor], number: int) -> Iterator[Row]:
    """Stage 03's function on a split, from JPEG files to maps in files."""

    network, config = network_of(backbone, runtime), AttentionConfig(scales=SCALES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = [SampleFiles(f"photo{index:04}", folder / f"photo{index:04}.jpg", (0,)) for index in range(number)]
        for files, photo in zip(listed, itertools.cycle(photos), strict=False):
            write_file(str(files.image), encode_jpeg(photo))
        samples = Samples(tuple(listed), tuple(map(str, range(20))), "train", read_sample)
        write_attention_maps(network, samples.subset(range(4)), folder / "warm-up", config, runtime)
        start = time.perf_counter()
        write_attention_maps(network, samples, folder / "maps", config, runtime)
        rate = number / (time.perf_counter() - start)
    yield {"backbone": backbone, "precision": runtime.precision, "photos": number, "photos a second": rate}


def measure_training(
    backbones: Sequence[str], runtimes: Sequence[Runtime], crops: Sequence[int], clock: Clock
) -> Iterator[Row]:
    """Forward, backward and AdamW's step on tensors on the device."""
    for backbone, runtime, crop in itertools.product(backbones, runtimes, crops):
        network = network_of(backbone, runtime).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
        images = torch.randn(TRAINED_AT_ONCE, 3, crop, crop, device=clock.device)
        labels = torch.randint(0, 2, (TRAINED_AT_ONCE, 21), device=clock.device).float()

        def step(
            network: nn.Module = network,
            optimizer: torch.optim.Optimizer = optimizer,
            runtime: Runtime = runtime,
            images: Tensor = images,
            labels: Tensor = labels,
        ) -> None:
            with runtime.autocast():
                logits = network(images).float().mean(dim=(2, 3))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            optimizer.step()

        taken, memory = clock.time(step)
        names = {"backbone": backbone, "precision": runtime.precision, "crop": crop}
        yield names | {"images a second": TRAINED_AT_ONCE / taken, "memory, GB": memory}


def measure_crf(photos: Sequence[Tensor], clock: Clock) -> Iterator[Row]:
    """Dense CRF from labels that all occur, on the device and by pydensecrf on one core."""
    params = CrfConfig()
    for number in LABELS:
        noise = torch.rand(len(photos), number, 12, 16, generator=torch.Generator().manual_seed(0))
        labels = list(F.interpolate(noise, size=PHOTO, mode="bilinear").argmax(dim=1).to(torch.uint8))

        def refined(backend: CrfBackend) -> list[Tensor]:
            pairs = zip(photos, labels, strict=True)  # noqa: B023
            return [dense_crf(photo, label, params, number, backend, clock.device) for photo, label in pairs]  # noqa: B023

        taken, memory = clock.time(lambda: refined("torch"))  # noqa: B023
        start = time.perf_counter()
        theirs = refined("pydensecrf")
        seconds = time.perf_counter() - start
        ours = refined("torch")
        yield {
            "labels": number,
            "ms an image": 1000 * taken / len(photos),
            "memory, GB": memory,
            "pydensecrf, ms": 1000 * seconds / len(photos),
            "pixels that differ": sum(int((a.cpu() != b).sum()) for a, b in zip(ours, theirs, strict=True)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="a folder of JPEG files")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement, at least")
    parser.add_argument("--quick", action="store_true", help="one backbone, one crop, few photos")
    arguments = parser.parse_args()
    device, quick = torch.device(arguments.device), arguments.quick
    torch.backends.cudnn.deterministic = True  # as smaf runs
    keep_freed_memory()
    backbones, crops = (BACKBONES[:1], CROPS[:1]) if quick else (BACKBONES, CROPS)
    runtimes = [Runtime(device, precision) for precision in (("float32",) if quick else ("float32", "bf16"))]
    clock, photos = Clock(device, arguments.seconds), photos_of(arguments.photos, 2 if quick else 16)
    for rows in (
        measure_maps(backbones, runtimes, clock),
        measure_split(backbones[0], runtimes[-1], photos, 4 if quick else 128),
        measure_training(backbones, runtimes, crops, clock),
        measure_crf(photos, clock),
    ):
        print(pd.DataFrame(rows).round(1).to_string(index=False), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
