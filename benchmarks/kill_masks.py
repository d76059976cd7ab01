"""Kill ``smaf masks`` at random moments, correct something in between; in the end the bytes of an undisturbed run.

    python -m benchmarks.kill_masks --kills 15 [--set KEY=VALUE ...]

Twelve drawn images; half of the kills fall into the training, half into the call after labels and thresholds were
corrected. With numbers for all names (``attention.options.class_numbers``) nothing is trained. Ends with status 1 at
the first difference.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minidata import make_mini
from smaflib.apps.corrections import write_correction
from smaflib.data.labels import write_labels
from smaflib.files import file_hash

SETTINGS = [
    "num_threads=1",
    "self_training.iterations=30",
    "self_training.resize_range=[64,96]",
    "data.longest_side=96",
]


def start(data: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["masks", "--images", data / "JPEGImages", "--labels", out / "labels.csv", "--out", out]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen([sys.executable, "-m", "smaflib", *map(str, words)], stderr=subprocess.DEVNULL)


def correct(out: Path) -> None:
    write_labels(out / "labels.csv", "000001", ["ram"])
    write_correction(out, "000002", bg_score=0.6)
    write_correction(out, "000003", leave_out=True)


def hashes(out: Path) -> dict[str, str]:
    """Of all files but the lock and the settings, which name the folder."""
    paths = (
        path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "config.yaml"
    )
    return {str(path.relative_to(out)): file_hash(path) for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    given, chance = parser.parse_args(), random.Random(0)
    kills = given.kills
    SETTINGS.extend(given.settings)
    with tempfile.TemporaryDirectory() as name:
        data, found, seconds = Path(name) / "data", [], [0.0, 0.0]
        make_mini(data, 12, 1, size=96)
        for kind in ("undisturbed", "killed"):
            out = Path(name) / kind / "masks"
            out.mkdir(parents=True)
            (out / "labels.csv").write_text((data / "labels.csv").read_text())
            for call in (0, 1):
                if call:
                    correct(out)
                for _ in range(kills // 2 + (call and kills % 2) if kind == "killed" else 0):
                    process = start(data, out)
                    time.sleep(chance.uniform(0.2, 1) * seconds[call])
                    process.kill()
                    process.wait()
                begun = time.monotonic()
                if start(data, out).wait():
                    sys.exit(f"{kind}, call {call}: the command failed")
                seconds[call] = seconds[call] or time.monotonic() - begun
            found.append(hashes(out))
        wrong = sorted(path for path in found[0].keys() | found[1].keys() if found[0].get(path) != found[1].get(path))
        print(f"{kills} kills, {len(found[0])} files, {len(wrong)} differ {wrong[:5]}")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
