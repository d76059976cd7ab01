"""How busy a device is while maps are made: a network that sleeps stands for it, so no GPU is needed.

    python benchmarks/busy.py            measures, writes results/busy.json and the table of docs/gpu.md
    python benchmarks/busy.py --page     the table alone

The function that stage 03 calls makes maps at four scales with flips, from JPEG files of VOC's size to files of maps.
Its network sleeps 30 ms per photo: in the thread that calls it (*sleeps*), or behind it, as a GPU that has a queue and
is waited for when its results are read (*queue*). Its device is torch's ``meta``, where copies, flips and joins cost
nothing: beside a GPU they are the GPU's work. All that is the host's is done: decode, resize, normalise, compress,
write. *Busy* is what all photos sleep, divided by the time from the first forward pass to the end of the last.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import itertools
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from smaflib.config import AttentionConfig
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.data.voc import read_image
from smaflib.files import PROJECT_ROOT, read_json, write_json
from smaflib.maps import write_attention_maps
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state
from smaflib.runtime import Runtime, keep_freed_memory, num_cores

RESULTS = Path(__file__).parent / "results" / "busy.json"
PAGE = PROJECT_ROOT / "docs" / "gpu.md"
SECONDS, CLASSES, STRIDE, SEED = 0.03, 20, 16, 0
SCALES = (0.5, 1.0, 1.5, 2.0)
SIZE = (375, 500)
THREADS = (0, 2)
KINDS = ("sleeps", "queue")


class HostOnly(Runtime):
    """Of a device that computes nothing."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class Promised(Tensor):
    """A result that is there at a moment, ``ready``, as all that is computed of it; ``cpu()`` waits for that."""

    ready = 0.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        ready = max((each.ready for each in args if isinstance(each, cls)), default=0.0)
        if func is Tensor.cpu:
            time.sleep(max(0.0, ready - time.perf_counter()))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, cls):
                each.ready = ready
        return made


class SleepingNetwork(nn.Module):
    """Sleeps in proportion to the pixels it is given, :data:`SECONDS` for all views of a photo; maps of chance."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.free = kind, 0.0  # when a queue will have done all that it was given
        self.weight = nn.Parameter(torch.zeros(()))  # says where the network is
        self.per_pixel = SECONDS / (2 * SIZE[0] * SIZE[1] * sum(scale**2 for scale in SCALES))
        self.first, self.last, self.slept = float("inf"), 0.0, 0.0

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, K+1, h, w)
        start = time.perf_counter()
        seconds = self.per_pixel * images[:, 0].numel()
        logits = logits_of_chance(len(images), images.shape[2] // STRIDE + 1, images.shape[3] // STRIDE + 1)
        self.free = max(start, self.free) + seconds
        if self.kind == "queue":
            logits = logits.as_subclass(Promised)
            logits.ready = self.free  # type: ignore[attr-defined]
        else:
            time.sleep(seconds)
            self.free = time.perf_counter()
        self.first, self.last = min(self.first, start), self.free
        self.slept += seconds
        return logits

    def attention(self, logits: Tensor) -> Tensor:
        return logits[:, 1:]


@functools.cache
def logits_of_chance(*shape: int) -> Tensor:
    """Softmax maps of chance, (B, K+1, h, w): their many digits make them slow to compress."""
    count, height, width = shape
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(count, CLASSES + 1, height, width, generator=generator).softmax(dim=1)


def photos(folder: Path, num: int, turned: bool) -> Samples:
    """Photos of chance: soft colours and a grain, about as many bytes as VOC's; ``turned``: each second one upright."""
    generator, files = torch.Generator().manual_seed(SEED), []
    for number in range(num):
        size = SIZE[::-1] if turned and number % 2 else SIZE
        soft = functional.interpolate(torch.rand(1, 3, 12, 16, generator=generator), size, mode="bicubic")[0]
        colors = 255 * soft + 12 * torch.randn(3, *size, generator=generator)
        path = folder / f"photo{number:04}.jpg"
        Image.fromarray(colors.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path, quality=80)
        files.append(SampleFiles(path.stem, path, (0,)))

    def read(files: SampleFiles, num_classes: int, load_masks: bool) -> Sample:
        return Sample(files.image_id, read_image(files.image), torch.ones(num_classes))

    return Samples(tuple(files), tuple(map(str, range(CLASSES))), "train", read)


def measure(num: int) -> list[dict[str, Any]]:
    """A row per number of threads, of photos of one size and of two that take turns."""
    rows = []
    for turned in (False, True):
        with tempfile.TemporaryDirectory(prefix="smaf-busy-") as name:
            folder = Path(name)
            samples = photos(folder, num, turned)
            for kind, threads in itertools.product(KINDS, THREADS):
                network, runtime = SleepingNetwork(kind), HostOnly(torch.device("meta"))
                used = time.process_time()
                with contextlib.redirect_stderr(io.StringIO()):
                    maps = write_attention_maps(
                        network,
                        samples,
                        folder / f"{kind}{threads}",
                        AttentionConfig(scales=SCALES),
                        runtime,
                    )
                assert all(maps.path(image_id).is_file() for image_id in samples.image_ids)
                taken = network.last - network.first
                rows.append(
                    {
                        "stand_in": kind,
                        "sizes": 2 if turned else 1,
                        "images_at_once": 1 if turned else 4,
                        "host_threads": threads,
                        "photos": num,
                        "photo_bytes": round(sum(f.image.stat().st_size for f in samples.files) / num),
                        "ms_per_photo": 1000 * taken / num,
                        "cpu_ms_per_photo": 1000 * (time.process_time() - used) / num,
                        "busy": network.slept / taken,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    columns = [
        "stand-in",
        "photos",
        "images at once",
        "host threads",
        "ms a photo",
        "CPU ms a photo",
        "busy, %",
    ]
    sizes = {1: "of one size", 2: "lying and upright in turns"}
    cells = [
        [
            row["stand_in"],
            sizes[row["sizes"]],
            str(row["images_at_once"]),
            str(row["host_threads"]),
            *(f"{value:.1f}" for value in (row["ms_per_photo"], row["cpu_ms_per_photo"], 100 * row["busy"])),
        ]
        for row in result["rows"]
    ]
    facts = result["facts"]
    where = f"{result['rows'][0]['photos']} photos, {facts['cores']} cores, torch {facts['torch']}, {facts['date']}"
    return f"{markdown_table(columns, cells)}\n\n`python benchmarks/busy.py`: {where}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=150, metavar="N", help="of each row")
    parser.add_argument("--page", action="store_true", help="write the table of what was measured, measure nothing")
    arguments = parser.parse_args()
    if not arguments.page:
        keep_freed_memory()  # as smaf runs
        torch.set_num_threads(1)  # of the thread that starts kernels: what it computes here, a GPU would
        facts = {
            "date": datetime.date.today().isoformat(),
            "cores": num_cores(),
            "platform": platform.platform(),
            "torch": torch.__version__,
        } | git_state()
        write_json(RESULTS, {"facts": facts, "rows": measure(arguments.photos)})
    fill_page(PAGE, "benchmarks/busy.py", {"busy": table(read_json(RESULTS, {}))})


if __name__ == "__main__":
    main()
