"""What one GPU does in a second: attention maps, training images, dense CRF; beside the bare network and pydensecrf.

    python benchmarks/gpu.py --photos VOC2012 --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --only run --run papermill_runs/mini-gpu --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --page benchmarks/results/gpu.json      the tables of docs/gpu.md
    python benchmarks/gpu.py --device cpu --quick                    the same on a CPU, to see that it runs

A few minutes on a GPU; ``--only`` makes some parts anew and keeps the others of the file. Weights are random. Times are
medians of calls that fill ``--seconds``, after two that choose kernels; the device is waited for before and after each.
Without ``--photos``, images of the mini set are drawn.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from smaflib.cams import class_attention
from smaflib.config import AttentionConfig, CrfConfig, ModelConfig, variant_label
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.data.views import views_of
from smaflib.files import PROJECT_ROOT, RUNS_FOLDER, read_json, write_json
from smaflib.maps import write_attention_maps
from smaflib.models.networks import AttentionNetwork
from smaflib.reactivation import hard_labels
from smaflib.refinement import crf, dense_crf_batch, mean_field
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.report.tables import results_table
from smaflib.runs.environment import git_state
from smaflib.runtime import Runtime, keep_freed_memory, num_cores

BACKBONES = ("timm/tf_efficientnet_lite2", "resnet101", "resnet38")
CROPS = (321, 448, 512)
TRAINED_AT_ONCE = 8
SCALES = (0.5, 1.0, 1.5, 2.0)
PHOTO = (375, 500)
LABELS = (3, 4, 5, 20, 21, 22)
BATCHES = (1, 16)
PARTS = ("maps", "splits", "training", "crf")
REFERENCE_RUN = RUNS_FOLDER / "reference"
PAGE = PROJECT_ROOT / "docs" / "gpu.md"

REFERENCE = CrfConfig()

Row = dict[str, Any]


class Clock:
    """Times calls on a device, and says how much of its memory they took."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """Seconds of a call, the median, and the most gigabytes of a GPU's memory that one held."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(2):
            call()
        start = time.perf_counter()
        times: list[float] = []
        while len(times) < 3 or time.perf_counter() - start < self.seconds:
            self.wait()
            before = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - before)
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else None
        return statistics.median(times), memory


def network_of(backbone: str, runtime: Runtime) -> AttentionNetwork:
    torch.manual_seed(0)
    stride = 8 if backbone == "resnet38" else 16
    config = ModelConfig(backbone=backbone, output_stride=stride, weights=None, freeze_batch_norm=True)
    return runtime.place(AttentionNetwork(config, num_classes=20, background=True))


def measure_maps(backbones: Sequence[str], runtimes: Sequence[Runtime], clock: Clock) -> Iterator[Row]:
    """Maps at four scales with flips: the whole call, and the network alone on tensors that are there already."""
    for backbone, runtime, images in itertools.product(backbones, runtimes, (1, 4)):
        network = network_of(backbone, runtime).eval()
        pictures = torch.randint(0, 256, (images, 3, *PHOTO), dtype=torch.uint8)
        inputs = [torch.stack(same) for same in zip(*(views_of(picture, SCALES) for picture in pictures), strict=True)]
        there = [torch.cat([each, each.flip(-1)]).to(clock.device) for each in inputs]

        @torch.no_grad()
        def bare(network: nn.Module = network, runtime: Runtime = runtime, there: list[Tensor] = there) -> None:
            with runtime.autocast():
                for each in there:
                    network.attention(network(each).float())

        alone, memory = clock.time(bare)
        from_host, _ = clock.time(lambda: [class_attention(network, each, True, runtime).cpu() for each in inputs])  # noqa: B023
        host, _ = clock.time(lambda: [views_of(picture, SCALES) for picture in pictures])  # noqa: B023
        yield {
            "backbone": backbone,
            "precision": runtime.precision,
            "images at once": images,
            "photos a second": images / from_host,
            "of the bare network": images / alone,
            "the host resizes": images / host,
            "memory, GB": memory,
        }


def measure_splits(backbone: str, runtime: Runtime, cases: list[Any], num: int) -> Iterator[Row]:
    """A whole split from files to files, by the function that stage 03 calls."""
    from torchvision.io import decode_jpeg, encode_jpeg, read_file, write_file

    network = network_of(backbone, runtime)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"photo{number:04}" for number in range(num)]
        for name, case in zip(names, itertools.cycle(cases), strict=False):
            write_file(str(Path(folder, f"{name}.jpg")), encode_jpeg(case[0]))

        def read(files: SampleFiles, num_classes: int) -> Sample:
            return Sample(files.image_id, decode_jpeg(read_file(str(files.image))), torch.ones(num_classes))

        listed = tuple(SampleFiles(name, Path(folder, f"{name}.jpg"), (0,)) for name in names)
        samples, config = Samples(listed, tuple(map(str, range(20))), "train", read), AttentionConfig(scales=SCALES)
        write_attention_maps(network, samples[:16], Path(folder, "warm"), config, runtime)  # chooses kernels
        start = time.perf_counter()
        write_attention_maps(network, samples, Path(folder, "all"), config, runtime)
        rate = num / (time.perf_counter() - start)
        yield {"backbone": backbone, "precision": runtime.precision, "photos": num, "photos a second": rate}


def measure_training(backbones: Sequence[str], runtimes: Sequence[Runtime], clock: Clock) -> Iterator[Row]:
    """Forward, backward and AdamW's step on tensors that are there already."""
    for backbone, runtime, crop in itertools.product(backbones, runtimes, CROPS):
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
        yield {
            "backbone": backbone,
            "precision": runtime.precision,
            "crop": crop,
            "images a second": TRAINED_AT_ONCE / taken,
            "memory, GB": memory,
        }


def measure_crf(cases: list[Any], labels: Sequence[int], batches: Sequence[int], clock: Clock) -> Iterator[Row]:
    """Dense CRF on the device, with the lattice and an iteration apart, beside pydensecrf on one core."""
    from refinement import unmerged  # beside this file, and on the path where this one is run

    for num_labels, batch in itertools.product(labels, batches):
        chosen = list(itertools.islice(itertools.cycle(cases), batch))
        images = [case[0].to(clock.device) for case in chosen]
        given = [(hard_labels(case[2], 0.35) % num_labels).to(clock.device) for case in chosen]
        energies = [unmerged(each, num_labels) for each in given]
        counts = [torch.ones(num_labels)] * batch

        def infer(iterations: int, images: list[Tensor] = images, energies: list[Tensor] = energies) -> list[Tensor]:
            params = REFERENCE.model_copy(update={"iterations": iterations})
            return mean_field.mean_field(images, energies, counts, params)  # noqa: B023

        whole, memory = clock.time(functools.partial(infer, REFERENCE.iterations))
        once, _ = clock.time(functools.partial(infer, 1))
        built, _ = clock.time(lambda: [mean_field.appearance_kernel(image, REFERENCE) for image in images])  # noqa: B023
        merged, _ = clock.time(
            functools.partial(dense_crf_batch, images, given, REFERENCE, num_labels, "torch", clock.device)
        )
        row: Row = {
            "labels": num_labels,
            "images at once": batch,
            "ms an image": 1000 * whole / batch,
            "of it, the lattice of colours": 1000 * built / batch,
            "ms an iteration": 1000 * (whole - once) / (REFERENCE.iterations - 1) / batch,
            "ms an image, labels that do not occur merged": 1000 * merged / batch,
            "memory, GB": memory,
        }
        if batch == min(batches) and crf.HAS_PYDENSECRF:
            host = [tensor.cpu() for tensor in (images[0], energies[0])]
            start = time.perf_counter()
            theirs = crf.pydensecrf_mean_field([host[0]], [host[1]], [counts[0]], REFERENCE)[0].argmax(dim=0)
            row["pydensecrf, ms"] = 1000 * (time.perf_counter() - start)
            row["pixels that differ"] = int((infer(REFERENCE.iterations)[0].argmax(dim=0).cpu() != theirs).sum())
        yield row


def compare_run(folder: Path) -> dict[str, Any]:
    """A run of configs/mini.yaml on a GPU beside the reference run of a CPU: mIoU by row, seconds by stage."""
    manifest, theirs = (read_json(folder / "manifest.json", {}), read_json(REFERENCE_RUN / "manifest.json", {}))
    tables = [results_table(pd.DataFrame(read_json(run / "metrics.json", []))) for run in (folder, REFERENCE_RUN)]
    both = tables[0]["mIoU"].to_frame("GPU").join(tables[1]["mIoU"].to_frame("CPU"), how="inner").reset_index()
    rows = [
        {
            "what": variant_label(row["variant"], row["fusion"] or None)
            + (f", scale {row['scale']}" if row["scale"] else ""),
            "split": row["split"],
            "GPU": round(row["GPU"], 3),
            "CPU": round(row["CPU"], 3),
        }
        for row in both.to_dict("records")
    ]
    facts = {
        "command": f"smaf run {manifest['config_file']} " + " ".join(f"--set {each}" for each in manifest["overrides"]),
        "date": manifest["stages"]["02_classifier"]["started"][:10],
        "device": manifest["device"],
        "torch": manifest["packages"]["torch"],
        "reference": theirs["device"],
        "seconds": {
            name: [stages["stages"][name]["seconds"] for stages in (manifest, theirs)]
            for name, entry in manifest["stages"].items()
            if entry["status"] == "complete"
        },
    }
    return {"facts": facts, "rows": rows}


def markdown(part: str, result: dict[str, Any]) -> str:
    """A part's rows as a table, its circumstances below."""
    facts, rows = result["facts"], result["rows"]
    cells = [
        ["" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in ({key: row.get(key) for key in rows[0]} for row in rows)
    ]
    table = markdown_table(list(rows[0]), cells)
    if part == "run":
        stages = [[name, *(f"{seconds:.0f}" for seconds in pair)] for name, pair in facts["seconds"].items()]
        table += "\n\n" + markdown_table(["stage", "GPU, s", "CPU, s"], stages)
    where = f"{facts['device']}, torch {facts['torch']}, {facts['date']}"
    return f"{table}\n\n`{facts['command'].strip()}`: {where}."


def facts_of(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cores": num_cores(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "seconds": arguments.seconds,
    } | git_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="VOC layout: JPEGImages, SegmentationClass")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement, at least")
    parser.add_argument("--images", type=int, default=16, help="for the CRF, at most so many")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write docs/gpu.md's tables of such a file, and end")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run of configs/mini.yaml, for --only run")
    parser.add_argument(
        "--only", nargs="+", choices=(*PARTS, "run"), default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="one backbone, one crop, two numbers of labels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    if arguments.page:
        parts = read_json(arguments.page, {})
        fill_page(PAGE, "benchmarks/gpu.py", {name: markdown(name, part) for name, part in parts.items()})
        return
    if arguments.only == ["run"]:
        if not (arguments.run and arguments.json):
            parser.error("--only run needs --run DIR and --json FILE")
        write_json(arguments.json, read_json(arguments.json, {}) | {"run": compare_run(arguments.run)})
        return
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --device cpu --quick shows that the benchmark runs")
    torch.backends.cudnn.deterministic = True  # as smaf runs
    keep_freed_memory()
    from refinement import load_cases

    quick = arguments.quick
    backbones, labels = (BACKBONES[:1], LABELS[:2]) if quick else (BACKBONES, LABELS)
    runtimes = [Runtime(device, precision) for precision in (("float32",) if quick else ("float32", "bf16"))]
    clock = Clock(device, arguments.seconds)
    cases = load_cases(arguments.photos, 2 if quick else arguments.images)
    measures: dict[str, Callable[[], Iterator[Row]]] = {
        "maps": lambda: measure_maps(backbones, runtimes, clock),
        "splits": lambda: measure_splits(backbones[0], runtimes[-1], cases, 6 if quick else 128),
        "training": lambda: measure_training(backbones, runtimes, clock),
        "crf": lambda: measure_crf(cases, labels, (1, 2) if quick else BATCHES, clock),
    }
    result: dict[str, Any] = read_json(arguments.json, {}) if arguments.json else {}
    facts = facts_of(device, arguments)
    print(facts, flush=True)
    for name in arguments.only:
        start = time.perf_counter()
        rows = [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in measures[name]()]
        result[name] = {"facts": facts, "rows": rows}
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)", flush=True)
        print(pd.DataFrame(rows).round(1).to_string(index=False), flush=True)
        if arguments.json:
            write_json(arguments.json, result)


if __name__ == "__main__":
    main()
