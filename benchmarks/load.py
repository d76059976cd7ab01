"""Many photos: time and memory of what happens before the networks, and what it costs to survive a power cut.

    python benchmarks/load.py --photos 1000 10000 100000

A folder of tiny photos and a table of two labels for each go through ``smaf masks --plan`` and ``smaf data check``,
each in a process of its own. Then 500 files are written with and without waiting for the disk. Results go to
results/load.json, the table to docs/robustness.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from smaflib import files
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state

RESULTS = Path(__file__).parent / "results" / "load.json"
PAGE = files.PROJECT_ROOT / "docs" / "robustness.md"
CLASSES = ("bicycle", "boat", "cat", "dog", "horse")
LINKS = 30_000
"""Names of one file; file systems allow some 60,000."""
FILE_BYTES, FILES = 60_000, 500
"""Of the attention maps of a photo of VOC, about."""


def make_photos(folder: Path, number: int) -> Path:
    """A folder of one tiny photo under many names, and its table with two labels a photo; returns the table."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for index in range(number):
        first, path = photos / f"photo{index // LINKS * LINKS}.jpg", photos / f"photo{index}.jpg"
        if path == first:
            Image.effect_noise((48, 32), 60).convert("RGB").save(first)
        else:
            os.link(first, path)
    table = folder / "labels.csv"
    rows = (f"photo{i}.jpg,{CLASSES[i % 5]};{CLASSES[(i + 1) % 5]}\n" for i in range(number))
    table.write_text("image,labels\n" + "".join(rows), encoding="utf-8")
    return table


def measure(words: Sequence[str]) -> dict[str, float]:
    """Seconds and peak memory of a command in a process of its own."""
    code = (
        "import json, resource, sys; from smaflib.apps.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    kilobytes = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": round(time.monotonic() - begun, 2), "megabytes": round(kilobytes / 1024, 1)}


def load(folder: Path, number: int) -> dict[str, Any]:
    table = make_photos(folder, number)
    images, out = str(table.parent / "photos"), str(folder / "out")
    settings = folder / "photos.yaml"
    settings.write_text(f"data: {{kind: folder, images: {images}, labels: {table}}}\n", encoding="utf-8")
    network = ["--backbone", "slim", "--set", "model.weights=null"]
    plan = measure(["masks", "--images", images, "--labels", str(table), "--out", out, "--plan", *network])
    return {"photos": number, "plan": plan, "check": measure(["data", "check", str(settings)])}


def flushing(folder: Path) -> dict[str, float]:
    """Milliseconds a file, as the library writes it and without waiting for the disk, in turns."""
    content, seconds = os.urandom(FILE_BYTES), {"flushed": 0.0, "not flushed": 0.0}
    flush = files._flush
    for index in range(2 * FILES):
        kind = list(seconds)[index % 2]
        files._flush = flush if kind == "flushed" else lambda path: None
        begun = time.perf_counter()
        with files.replacing(folder / f"{index}.npz") as temporary:
            temporary.write_bytes(content)
        seconds[kind] += time.perf_counter() - begun
    files._flush = flush
    return {kind: round(1000 * total / FILES, 2) for kind, total in seconds.items()}


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for row in result["load"]:
        cells = [f"{row[what]['seconds']:.1f} s, {row[what]['megabytes']:.0f} MB" for what in ("plan", "check")]
        lines.append([f"{row['photos']:,}", *cells])
    cost = result["milliseconds a file"]
    without = f"of which {cost['not flushed']:.1f} ms without waiting for the disk"
    table = markdown_table(["photos", "`smaf masks --plan`", "`smaf data check`"], lines)
    return f"{table}\n\nA file of {FILE_BYTES // 1000} kB takes {cost['flushed']:.1f} ms, {without}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[1000, 10_000, 100_000])
    arguments = parser.parse_args()
    result: dict[str, Any] = {"load": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in arguments.photos:
            result["load"].append(load(Path(folder, str(number)), number))
            print(result["load"][-1], file=sys.stderr, flush=True)
        result["milliseconds a file"] = flushing(Path(folder, "flushing"))
    files.write_json(RESULTS, result | git_state())
    fill_page(PAGE, "benchmarks/load.py", {"load": markdown(result)})
    print(markdown(result))


if __name__ == "__main__":
    main()
