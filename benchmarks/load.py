"""Many photos, a large annotation file, a day of exploring: time and memory; and what it costs to survive a power cut.

    python benchmarks/load.py [--only photos flushing coco moves]

A folder of tiny photos and a table of two labels for each go through ``smaf masks --plan`` and ``smaf data check``,
each in a process of its own. 500 files are written with and without waiting for the disk. A file of COCO's instances is
read with and without outlines. The explorer's controls are moved. Results go to results/load.json, the tables to
docs/robustness.md; what ``--only`` leaves out stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
PHOTOS, COCO_MEGABYTES, MOVES = (1000, 10_000, 100_000), 500, 10_000
PARTS = ("photos", "flushing", "coco", "moves")


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


def measure(words: Sequence[str], says: str = "") -> dict[str, float]:
    """Seconds and peak memory of a command in a process of its own, which must say something."""
    code = (
        "import sys; from smaflib.apps.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
    )
    return measure_code(code, words, says)


def measure_code(code: str, words: Sequence[str] = (), says: str = "") -> dict[str, float]:
    """Seconds and peak memory of a program in a process of its own, which must say something."""
    # Not getrusage, whose peak begins with that of the process that started this one.
    code += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    seconds = time.monotonic() - begun
    if done.returncode or says not in done.stdout + done.stderr:
        sys.exit(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return {"seconds": round(seconds, 2), "megabytes": round(int(done.stdout.splitlines()[-1]) / 1024, 1)}


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


def write_instances(path: Path, megabytes: int) -> int:
    """A file of COCO's instances, outlines as long as COCO's: seven to an image; returns the number of instances."""
    generator = random.Random(0)
    outlines = [
        [round(generator.uniform(0, 480), 2) for _ in range(generator.choice((20, 60, 200)))] for _ in range(99)
    ]
    texts = [json.dumps(outline) for outline in outlines]
    number, images, head = 0, [], json.dumps([{"id": label, "name": f"class{label}"} for label in range(1, 81)])
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"categories": {head}, "annotations": [')
        while file.tell() < 1e6 * megabytes:
            images.append({"id": len(images), "file_name": f"{len(images):012}.jpg", "height": 480, "width": 640})
            for _ in range(7):
                shape = f'"segmentation": [{texts[number % 99]}], "area": 702.5, "bbox": [1.5, 2.5, 38.6, 28.7]'
                ids = f'"id": {number}, "image_id": {len(images) - 1}, "category_id": {1 + number % 80}'
                file.write(f'{", " if number else ""}{{{shape}, {ids}, "iscrowd": 0}}')
                number += 1
        file.write(f'], "images": {json.dumps(images)}}}')
    return number


def read_coco(folder: Path, megabytes: int) -> dict[str, Any]:
    """Time and memory of reading a file of instances, for labels and with the outlines, and of the imports alone."""
    path = folder / "annotations" / "instances_many.json"
    path.parent.mkdir(parents=True)
    number = write_instances(path, megabytes)
    code = "import sys; from pathlib import Path; from smaflib.data.coco import read_instances\n"
    read = "read_instances(Path(sys.argv[1]), 'many', outlines={})"
    result: dict[str, Any] = {"megabytes": path.stat().st_size // 10**6, "instances": number}
    result |= {"imports": measure_code(code), "labels": measure_code(code + read.format(False), [str(folder)])}
    return result | {"outlines": measure_code(code + read.format(True), [str(folder)])}


def explore(moves: int) -> list[dict[str, float]]:
    """Memory of a kernel while the explorer's controls are moved, after 1 %, 10 % and all of the moves."""
    from smaflib.explorer.widget import Explorer

    explorer, generator, rows = Explorer(), random.Random(0), []
    begun = time.monotonic()
    for move in range(1, moves + 1):
        name = generator.choice(
            ("bg_score", "weight_0", "weight_3", "fusion", "reactivate", "denoise", "image", "pixel")
        )
        if name == "image":
            explorer.board.index = generator.randrange(len(explorer.gallery.samples))
        elif name == "pixel":
            explorer.board.pixel = [generator.randrange(64), generator.randrange(64)]
        elif name == "fusion":
            explorer.controls[name].value = generator.choice(("sum", "mean", "max", "size_adaptive"))
        elif name in ("reactivate", "denoise"):
            explorer.controls[name].value = generator.random() < 0.5
        else:
            explorer.controls[name].value = round(generator.uniform(0.05, 0.95), 2)
        assert explorer.board.status.get("kind") != "error", explorer.board.status
        if move in (moves // 100, moves // 10, moves):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            rows.append({"moves": move, "megabytes": round(resident, 1), "seconds": round(time.monotonic() - begun, 1)})
    return rows


def markdown_photos(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        cells = [f"{row[what]['seconds']:.1f} s, {row[what]['megabytes']:.0f} MB" for what in ("plan", "check")]
        lines.append([f"{row['photos']:,}", *cells])
    return markdown_table(["photos", "`smaf masks --plan`", "`smaf data check`"], lines)


def markdown_flushing(cost: dict[str, float]) -> str:
    without = f"of which {cost['not flushed']:.1f} ms without waiting for the disk"
    return f"A file of {FILE_BYTES // 1000} kB takes {cost['flushed']:.1f} ms, {without}."


def markdown_coco(row: dict[str, Any]) -> str:
    names = {"imports": "imports alone", "labels": "image labels", "outlines": "outlines, for masks"}
    lines = [[text, f"{row[name]['seconds']:.1f}", f"{row[name]['megabytes']:,.0f}"] for name, text in names.items()]
    head = [f"a file of {row['megabytes']} MB, {row['instances']:,} instances", "s", "MB"]
    return markdown_table(head, lines)


def markdown_moves(rows: Sequence[dict[str, float]]) -> str:
    lines = [[f"{row['moves']:,}", f"{row['megabytes']:.0f}", f"{row['seconds']:.0f}"] for row in rows]
    return markdown_table(["moves of the explorer's controls", "memory of the kernel, MB", "s"], lines)


MARKDOWN: dict[str, Callable[[Any], str]] = {
    "photos": markdown_photos,
    "flushing": markdown_flushing,
    "coco": markdown_coco,
    "moves": markdown_moves,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()
    result = files.read_json(RESULTS, {})
    with tempfile.TemporaryDirectory() as folder:
        measures: dict[str, Callable[[], Any]] = {
            "photos": lambda: [load(Path(folder, str(number)), number) for number in PHOTOS],
            "flushing": lambda: flushing(Path(folder, "flushing")),
            "coco": lambda: read_coco(Path(folder, "coco"), COCO_MEGABYTES),
            "moves": lambda: explore(MOVES),
        }
        for part in arguments.only:
            result[part] = measures[part]()
            print(MARKDOWN[part](result[part]), flush=True)
    files.write_json(RESULTS, result | git_state())
    fill_page(PAGE, "benchmarks/load.py", {part: make(result[part]) for part, make in MARKDOWN.items()})


if __name__ == "__main__":
    main()
