"""How long do backbones take for a pair of images, by memory layout and precision?

    chrt -f 10 python benchmarks/backbones.py [timm/tf_efficientnet_lite2 resnet18 ...] [--rounds 15]

All settings take turns in one run, so that what else the machine does hits them alike; figures are medians, in ms.
Weights are random, on the CPU. `chrt -f 10` (Linux, as root) keeps other processes away.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import pandas as pd
import torch

from smaflib.config import ModelConfig
from smaflib.models.backbones import build_backbone
from smaflib.runtime import Runtime, keep_freed_memory, num_cores

BACKBONES = ("timm/tf_efficientnet_lite2", "timm/tf_efficientnet_lite0", "timm/mobilenetv3_large_100", "resnet18")
SETTINGS = (
    (torch.contiguous_format, "float32"),
    (torch.channels_last, "float32"),
    (torch.channels_last, "bf16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=BACKBONES)
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(376, 500), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    keep_freed_memory()
    times: dict[tuple[str, str], list[float]] = {}
    for name in options.backbones:
        config = ModelConfig(backbone=name, output_stride=options.output_stride)
        copies = [build_backbone(config).eval().to(memory_format=layout) for layout, _ in SETTINGS]
        images = torch.rand(2, 3, *options.size)
        for turn, (copy, (layout, precision)) in itertools.product(
            range(options.rounds + 2), zip(copies, SETTINGS, strict=True)
        ):
            with torch.inference_mode(), Runtime(torch.device("cpu"), precision).autocast():
                start = time.perf_counter()
                copy(images)
            if turn >= 2:  # the first calls choose kernels
                column = f"{precision}, {str(layout).removeprefix('torch.')}"
                times.setdefault((name, column), []).append(1e3 * (time.perf_counter() - start))
    table = pd.Series({key: statistics.median(values) for key, values in times.items()}).unstack()
    print(table.loc[list(options.backbones)].round(1).to_string())


if __name__ == "__main__":
    main()
