"""The cost model of docs/scaling.md, worked out by hand; and its page, which is that of its numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import many_files, scaling
from smaflib.config import Config, load_config
from smaflib.files import SHIPPED

RATES = {"maps": 10.0, "segmenter maps": 20.0, "host": 40.0, "train": 100.0, "segmenter train": 200.0, "crf": 50.0}


@pytest.fixture(scope="module")
def voc() -> Config:
    """20,000 steps of 8 images for teacher and student; of 10 for the segmentation network, at scales .5, .75 and 1."""
    return load_config(SHIPPED / "configs" / "voc12.yaml")


def case(gpus: int, passes: float | None = None) -> scaling.Case:
    return scaling.Case("photos", photos=9_000, val=1_000, classes=40, preset="voc12", gpus=gpus, passes=passes)


def test_seconds_of_one_gpu_by_hand(voc: Config) -> None:
    assert scaling.gpu_seconds(case(1), voc, RATES) == pytest.approx(
        {
            "02 training": 160_000 / 100,
            "03 maps": 10_000 / 10,
            "05 training": 160_000 / 100,
            "05 maps": 10_000 / 10,
            "06 masks": 9_000 / 50,
            "07 training": 200_000 * (0.25 + 0.5625 + 1) / 200,
            # test scales .5 .75 1 1.25 1.5 against .5 1 1.5 2 of the maps
            "07 masks": 1_000 * ((0.25 + 0.5625 + 1 + 1.5625 + 2.25) / (0.25 + 1 + 2.25 + 4) / 20 + 1 / 50),
        }
    )


def test_passes_take_the_place_of_steps(voc: Config) -> None:
    seconds = scaling.gpu_seconds(case(1, passes=2), voc, RATES)
    assert seconds["02 training"] == 18_000 / 100 and seconds["07 training"] == 18_000 * 1.8125 / 200


def test_shards_share_maps_and_masks_over_all_gpus_and_processes_the_rest_over_one_machine() -> None:
    seconds = {"02 training": 7200.0, "03 maps": 7200.0, "05 maps": 7200.0, "06 masks": 7200.0}
    assert scaling.hours(case(64), seconds, trainings_gain=True) == {
        "02 training": 2 / 8,
        "03 maps": 2 / 64,
        "05 maps": 2 / 8,
        "06 masks": 2 / 64,
    }
    assert scaling.hours(case(64), seconds, trainings_gain=False)["02 training"] == 2
    assert set(scaling.hours(case(1), seconds, trainings_gain=True).values()) == {2}


def test_files_and_bytes_by_hand(voc: Config) -> None:
    """Stride 8 against the measured 16: four times the cells; 40 classes against 20."""
    assert scaling.disk(case(1), voc, {"maps": 1000.0, "mask": 100.0}) == pytest.approx(
        {
            "files": 30_000,
            "GB": (2 * 10_000 * 8_000 + 10_000 * 100) / 1e9,
            "traffic GB": (2 * 10_000 * 8_000 + 10_000 * 100 + (160_000 + 9_000) * 8_000) / 1e9,
        }
    )


def test_rates_are_those_of_the_presets_networks(voc: Config) -> None:
    row: dict[str, Any] = {"precision": "float32", "images at once": 1, "the host resizes": 1.0, "memory, GB": 2.0}
    gpu = {
        "maps": [
            row | {"backbone": name, "photos a second": rate} for name, rate in (("resnet101", 8), ("resnet38", 4))
        ],
        "training": [
            {"backbone": name, "precision": "float32", "crop": crop, "images a second": rate, "memory, GB": 3.0}
            for name, crop, rate in (("resnet38", 321, 1), ("resnet38", 448, 2), ("resnet101", 321, 3))
        ],
        "crf": [{"labels": 3, "images at once": 1, "ms an image, labels that do not occur merged": 20.0}],
    }
    rates = scaling.rates_of({name: {"rows": rows} for name, rows in gpu.items()}, voc)
    assert (rates["maps"], rates["segmenter maps"], rates["train"], rates["segmenter train"]) == (4, 8, 2, 3)
    assert (rates["crf"], rates["maps GB"], rates["train GB"]) == (50, 2, 3)


def test_page_is_that_of_its_numbers() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    sizes = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))["disk"]
    for name, table in scaling.tables(json.loads(scaling.GPU.read_text(encoding="utf-8")), sizes).items():
        assert table in page, name
    result = json.loads(many_files.RESULTS.read_text(encoding="utf-8"))
    for name, make in many_files.MARKDOWN.items():
        assert make(result) in page, name


def test_what_a_finished_run_costs_a_command_grows_little_with_its_files() -> None:
    rows = json.loads(many_files.RESULTS.read_text(encoding="utf-8"))["rows"]
    most, fewest = rows[-1], rows[0]
    assert most["images"] == 1_000_000
    for name in ("run", "status", "report"):
        grown = {key: most["commands"][name][key] - fewest["commands"][name][key] for key in ("seconds", "megabytes")}
        images = most["images"] - fewest["images"]
        assert grown["seconds"] / images < 50e-6 and 1000 * grown["megabytes"] / images < 1, name  # kB an image
    assert max(row["bytes"]["manifest.json"] for row in rows) < 1.1 * fewest["bytes"]["manifest.json"]
