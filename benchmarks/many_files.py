"""A finished run of very many images: what ``smaf`` takes to see that there is nothing to do, and how large files get.

    python benchmarks/many_files.py --folder DIR [--sizes 10000 100000 1000000] [--fill | --page]

A chain of eight drawn images is run once. Its folder is then filled up: a file of maps and a mask for each further
image, every one a file of its own (an inode, 4 kB of disk) with the bytes of the first; student's maps and photos are
further names of such files. Manifest entries are written by the library's own functions. Every command runs in a
process of its own, the names of the files still in the machine's memory: a cold disk or a file server takes longer.
A million images take 9 GB of disk; filled folders stay in DIR, ``--fill`` only makes them. Results go to
results/many_files.json, tables to docs/scaling.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smaflib import files
from smaflib.config import check_settings, load_config
from smaflib.data import make_data
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.attempt import put_entry
from smaflib.runs.environment import git_state
from smaflib.runs.inputs import config_hash, data_hashes, stage_inputs
from smaflib.runs.manifest import list_artifacts, read_manifest, record_hash, write_manifest
from smaflib.runs.run import Run, read_run
from smaflib.runs.stages import STAGES, stage_named

RESULTS = Path(__file__).parent / "results" / "many_files.json"
PAGE = files.PROJECT_ROOT / "docs" / "scaling.md"
SIZES, DRAWN, LINKS = (10_000, 100_000, 1_000_000), 8, 30_000
TRAINING = {"iterations": 4, "batch_size": 4, "crop_size": 48, "resize_range": [48, 64]}
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "num_threads": 1,
    "model": {"backbone": "slim", "weights": None, "freeze_batch_norm": False},
    "classifier": TRAINING | {"pretraining": "plain"},
    "attention": {"scales": [0.5, 1.0]},
    "self_training": TRAINING,
    "pseudo_masks": {"crf": "mini", "num_workers": 1},
    "segmentation": {"enabled": False},
}
OWN_FILES = ("manifest.json", "metrics.json", "index.html")
COMMANDS = {
    "run": "`smaf run`, all complete",
    "status": "`smaf status`",
    "report": "`smaf report` (`index.html`)",
    "shard done": "`smaf shard`, stage complete",
    "shard": "`smaf shard --part 1/8`, all there",
    "hash": "stage 06 ends: masks hashed",
    "reuse": "`smaf run --reuse`, all taken over",
}
HASH = """import sys
from pathlib import Path
from smaflib.runs.manifest import list_artifacts
from smaflib.runs.stages import stage_named
list_artifacts(Path(sys.argv[1]), stage_named("06"))
"""


def make_run(folder: Path) -> Run:
    """The chain of a few drawn images, by ``smaf run``: a folder of photos, a table, a run folder ``base``."""
    data = {"kind": "mini", "num_train": DRAWN, "num_val": 1, "image_size": 64}
    make_data(check_settings(SETTINGS | {"data": data}), folder)
    drawn = next(folder.rglob("JPEGImages"))
    rows = [f"{path.name},{('cat', 'dog')[number % 2]}\n" for number, path in enumerate(sorted(drawn.iterdir()))]
    write_settings(folder, drawn, rows)
    words = ["run", str(folder / "photos.yaml"), "--name", "base", "--runs", str(folder)]
    subprocess.run([sys.executable, "-m", "smaflib", *words], check=True, stdout=subprocess.DEVNULL)
    return read_run(folder / "base")


def write_settings(folder: Path, images: Path, rows: Sequence[str]) -> None:
    """``labels.csv`` and ``photos.yaml``, which names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text("image,labels\n" + "".join(rows), encoding="utf-8")
    data = {"kind": "folder", "images": str(images), "labels": str(folder / "labels.csv")}
    files.write_json(folder / "photos.yaml", SETTINGS | {"data": data})  # JSON is YAML


def fill(base: Run, folder: Path, number: int) -> None:
    """A run of ``number`` images in ``folder / many``; a file ``filled`` says that all is there."""
    names = [f"photo{index:07}" for index in range(number)]
    photos, run = folder / "photos", folder / "many"
    shutil.copytree(base.folder, run, ignore=shutil.ignore_patterns("cams", "masks", "masks_compared"))
    for kind, ending in (("cams/teacher", ".npz"), ("masks", ".png")):
        content = next(base.path(kind).glob(f"*{ending}")).read_bytes()
        (run / kind).mkdir(parents=True)
        for name in names:
            (run / kind / f"{name}{ending}").write_bytes(content)
    (run / "cams" / "student").mkdir()
    for name in names:
        os.link(run / "cams" / "teacher" / f"{name}.npz", run / "cams" / "student" / f"{name}.npz")
    photos.mkdir()
    for begin in range(0, number, LINKS):  # a file system allows some 60,000 names of one file
        shutil.copyfile(next(base.config.data.images.glob("*.jpg")), photos / f"{names[begin]}.jpg")  # type: ignore[union-attr]
        for name in names[begin + 1 : begin + LINKS]:
            os.link(photos / f"{names[begin]}.jpg", photos / f"{name}.jpg")
    write_settings(folder, photos, [f"{name}.jpg,{('cat', 'dog')[index % 2]}\n" for index, name in enumerate(names)])
    shutil.copyfile(folder / "photos.yaml", run / "config.yaml")
    for stage in STAGES:
        made = {"records": record_hash(run, stage), "artifacts": list_artifacts(run, stage)}
        put_entry(run, stage, read_manifest(run)["stages"][stage.name], **made)
    (folder / "filled").touch()


def complete(folder: Path) -> None:
    """Write the manifest's entries as the runner of this version of the library would have, after each stage."""
    run, config_file = folder / "many", folder / "photos.yaml"
    config = load_config(config_file)
    manifest = read_manifest(run) | {"run": "many", "config_file": str(config_file), "overrides": []}
    write_manifest(run, manifest)
    data = data_hashes(config.data)
    for stage in STAGES:
        entry = read_manifest(run)["stages"][stage.name]
        inputs = stage_inputs(run, stage, files.SHIPPED / "notebooks" / f"{stage.name}.ipynb", data)
        read = {name: value for name, value in entry["settings_read"].items() if not name.startswith("data")}
        own = {"status": "complete", "exit_code": 0, "settings_read": read, "config_hash": config_hash(config)}
        put_entry(run, stage, entry | inputs | own)


def measure_commands(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds and peak memory of each command on the run of :func:`fill`; a shard works where 06 is not complete."""
    from load import measure, measure_code  # beside this file, and on the path where this one is run

    where, end = ["--runs", str(folder)], f"{STAGES[-1].name}  "
    run, shard = (
        ["run", str(folder / "photos.yaml"), *where, "--name"],
        ["shard", "many", *where, "--part", "1/8", "06"],
    )
    complete(folder)
    sum(len(names) for _, _, names in os.walk(folder))  # brings the names into memory
    yield "run", measure([*run, "many"], f"{end}complete, skipped")
    yield "status", measure(["status", "many", *where], f"{end.strip():26} complete")
    yield "report", measure(["report", "many", *where], "index.html")
    yield "shard done", measure(shard, "complete, nothing to do")
    entry = read_manifest(folder / "many")["stages"]["06_pseudo_masks"]
    put_entry(folder / "many", stage_named("06"), entry, status="running", exit_code=None)
    yield "shard", measure(shard, "0 made")
    put_entry(folder / "many", stage_named("06"), entry)  # a shard takes the list of artifacts out
    complete(folder)
    yield "hash", measure_code(HASH, [str(folder / "many")])
    shutil.rmtree(folder / "again", ignore_errors=True)
    yield "reuse", measure([*run, "again", "--reuse", "many"], f"{end}taken over")


# --------------------------------------------------------------------------------------------------------------- table


def markdown_commands(result: dict[str, Any]) -> str:
    """A line per size, above it the same with the library as it was before this was measured for the first time."""
    before = [(row, ", before") for row in result.get("before", [])]
    rows = sorted(before + [(row, "") for row in result["rows"]], key=lambda pair: pair[0]["images"])

    measured = [key for key in COMMANDS if any(key in row["commands"] for row, _ in rows)]

    def cell(found: dict[str, float] | None) -> str:
        return f"{found['seconds']:.1f} s, {found['megabytes']:.0f} MB" if found else ""

    lines = [[f"{row['images']:,}{when}", *(cell(row["commands"].get(key)) for key in measured)] for row, when in rows]
    return markdown_table(["images", *(COMMANDS[key] for key in measured)], lines)


def markdown_files(result: dict[str, Any]) -> str:
    rows = [
        [f"{row['images']:,}", *(f"{row['bytes'][name] / 1000:.0f}" for name in OWN_FILES)] for row in result["rows"]
    ]
    return markdown_table(["images", *(f"`{name}`, kB" for name in OWN_FILES)], rows)


MARKDOWN: dict[str, Callable[[dict[str, Any]], str]] = {"commands": markdown_commands, "files": markdown_files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk that is to be measured")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="N", help="numbers of images")
    parser.add_argument("--key", choices=("rows", "before"), default="rows", help="where in the file the results go")
    parser.add_argument("--fill", action="store_true", help="only make the folders")
    parser.add_argument("--page", action="store_true", help="write the tables of what was measured, measure nothing")
    arguments = parser.parse_args()
    result, state, today = files.read_json(RESULTS, {}), git_state(), datetime.date.today().isoformat()
    if not arguments.page:
        if arguments.folder is None:
            parser.error("--folder DIR says where")
        home = arguments.folder.absolute()
        base = read_run(home / "base") if (home / "base").is_dir() else make_run(home)
        for number in arguments.sizes:
            folder = home / f"images{number}"
            if not (folder / "filled").is_file():
                fill(base, folder, number)
            if not arguments.fill:
                rows = {row["images"]: row for row in result.get(arguments.key, [])}
                row = rows.setdefault(number, {"images": number, "commands": {}})
                result |= {arguments.key: [rows[key] for key in sorted(rows)], "date": today}
                for name, found in measure_commands(folder):
                    row["commands"][name] = found
                    row["bytes"] = {each: (folder / "many" / each).stat().st_size for each in OWN_FILES}
                    print(number, name, found, flush=True)
                    files.write_json(RESULTS, result | state)
    if not arguments.fill and arguments.key == "rows":
        fill_page(PAGE, "benchmarks/many_files.py", {name: make(result) for name, make in MARKDOWN.items()})


if __name__ == "__main__":
    main()
