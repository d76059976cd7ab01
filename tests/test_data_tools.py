"""`smaf data check` and `fetch`, the conversion of the field's labels, and the zip for VOC's server."""

from __future__ import annotations

import io
import pickle
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import new_segmenter, tiny_config
from PIL import Image
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.apps.voc_submission import write_submission
from smaflib.config import Config
from smaflib.data import make_data
from smaflib.data.check import check_data
from smaflib.data.masks import read_mask, save_mask
from smaflib.errors import ConfigError, DataError
from smaflib.models.weights import write_weights
from smaflib.runs import Run
from smaflib.runtime import Runtime
from smaflib.segmentation import segment
from smaflib.workspace import Workspace
from tools.cls_labels import convert

# --- cls_labels.npy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "dtype"), [(2, "float32"), (4, "uint8")])
def test_labels_of_the_field_become_a_csv(tmp_path: Path, protocol: int, dtype: str) -> None:
    table = {"2007_000032": np.array([1, 0, 1], dtype=dtype), "2007_000039": np.array([0, 1, 0], dtype=dtype)}
    table["empty"] = np.zeros(3, dtype=dtype)
    with (tmp_path / "cls_labels.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(table, dtype=object), file, protocol=protocol)
    target = tmp_path / "labels.csv"
    assert convert(tmp_path / "cls_labels.npy", target, ["cat", "cow", "dog"]) == 1
    assert target.read_text() == "image,labels\n2007_000032,cat;dog\n2007_000039,cow\n"


class Trap:
    """Unpickled without care, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_labels_that_would_run_code_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", {"x": Trap(tmp_path / "trace")}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(pickle.UnpicklingError, match=r"the file asks for pathlib\S*, which a table"):
        convert(tmp_path / "a.npy", tmp_path / "labels.csv", ["cat"])
    assert not (tmp_path / "trace").exists() and not (tmp_path / "labels.csv").exists()


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos and their masks, all as they should be."""
    root = tmp_path / "photos"
    (root / "masks").mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 12 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg")
        mask = np.zeros((8, 12 + number), dtype=np.uint8)
        mask[2:5, 2:5] = number % 2 + 1
        save_mask(root / "masks" / f"{number}.png", mask)
    (root / "labels.csv").write_text("image,labels\n0,cat\n1,dog\n2,cat\n")
    return root


def photos_config(root: Path, **data: Any) -> Config:
    settings = {"kind": "folder", "images": root, "labels": root / "labels.csv", "masks": root / "masks"}
    return Config.model_validate({"data": settings | {"class_names": ["cat", "dog"]} | data})


def test_check_counts_what_is_there(photos: Path) -> None:
    facts, problems = check_data(photos_config(photos))
    assert problems == []
    assert facts == [
        "train: 3 images, 1.00 labels per image, 3 masks, 0 saliency maps",
        "train: images per class: cat 2, dog 1",
        "train: width 12 to 14 (median 13), height 8 to 8 (median 8)",
        "val: no images",
    ]


def test_check_finds_all_damage_at_once(photos: Path) -> None:
    (photos / "0.jpg").write_bytes((photos / "0.jpg").read_bytes()[:200])
    save_mask(photos / "masks/1.png", np.ones((4, 4), dtype=np.uint8))
    mask = read_mask(photos / "masks/2.png")
    mask[mask == 1] = 2  # a dog, but the label says cat
    save_mask(photos / "masks/2.png", mask)
    facts, problems = check_data(photos_config(photos))
    assert len(problems) == 2
    assert "0.jpg cannot be read as an image" in problems[0] and "1.png is 4 x 4 pixels" in problems[1]
    assert "train: labels without a pixel in the mask: 1, such as 2 (cat)" in facts
    assert "train: pixels without a label: 1, such as 2 (dog)" in facts


def spoil_masks(root: Path, how: str) -> None:
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        mask = read_mask(path).numpy()
        if how == "yes or no":
            save_mask(path, (mask > 0).astype(np.uint8) * 255)
        elif how == "all background":
            save_mask(path, mask * 0)
        elif number == 1:  # a single one is enough
            unknown = Image.fromarray(np.full((*mask.shape, 3), (255, 10, 99), np.uint8))
            spoiled = {"colors of no class": unknown, "a class too many": Image.fromarray(mask + 4)}
            spoiled["another size"] = Image.fromarray(mask[1:])
            if how in spoiled:
                spoiled[how].save(path)
            else:
                path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "yes or no": "hold 0 (background) and 255 (void) only; give the pixels of a class its number",
        "all background": "hold 0 (background) and 255 (void) only; give the pixels of a class its number",
        "colors of no class": "1.png has the color [255, 10, 99]; save masks as 8-bit grey PNGs",
        "a class too many": "1.png holds the value 4; with 2 classes",
        "another size": "1.png is 13 x 7 pixels",
        "cut off": "1.png cannot be read as an image",
    }.items(),
)
def test_masks_that_cannot_be_used_are_a_problem_of_the_check_and_leave_a_run_without_ground_truth(
    photos: Path, tmp_path: Path, how: str, words: str
) -> None:
    spoil_masks(photos, how)
    config = photos_config(photos, longest_side=16)
    assert words in " ".join(problems := check_data(config)[1]) and len(problems) == 1
    work = Workspace(tmp_path / "run", config)
    summary = make_data(config, work.folder)
    assert words in summary["train"]["unusable"] and "object_shares" not in summary["train"]
    samples = work.samples()
    assert len(samples) == 3 and not samples.annotated and samples.ground_truth is None


def test_check_on_the_command_line(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(f"data: {{kind: folder, images: {photos}, labels: {photos}/labels.csv}}\n")
    result = CliRunner().invoke(app, ["data", "check", str(config)])
    assert result.exit_code == 0 and "images per class: cat 2, dog 1" in result.output
    (photos / "1.jpg").write_bytes(b"no picture")
    result = CliRunner().invoke(app, ["data", "check", str(config)])
    assert result.exit_code == 1 and "PROBLEM: train:" in result.output


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_fetch_leaves_the_download_to_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("torchvision.datasets.VOCDetection", lambda folder, **given: asked.append(given))
    result = CliRunner().invoke(app, ["data", "fetch", "voc12", "--out", str(tmp_path / "data")])
    assert result.exit_code == 0 and result.output == f"data.root: {tmp_path / 'data/VOCdevkit/VOC2012'}\n"
    assert asked == [{"year": "2012", "image_set": "trainval", "download": True}]

    def down(folder: Path, **given: Any) -> None:
        raise urllib.error.URLError("nobody answers")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", down)
    result = CliRunner().invoke(app, ["data", "fetch", "voc12", "--out", str(tmp_path / "data")])
    assert (
        result.exit_code == 2 and "nobody answers" in result.output and "put VOCtrainval_11-May-2012" in result.output
    )


# --- VOC's server -----------------------------------------------------------------------------------------------------


def test_submission_holds_palette_masks_where_the_server_expects_them(photos: Path, tmp_path: Path) -> None:
    config = tiny_config(data={"kind": "folder", "images": photos, "labels": photos / "labels.csv"})
    run = Run(tmp_path / "run", config, tmp_path / "my.yaml")
    with pytest.raises(ConfigError, match="no weights file .*segmenter"):
        write_submission(run, ["0"], photos, tmp_path / "results.zip")
    network = new_segmenter(config, 2, Runtime()).eval()
    write_weights(run.path("checkpoints/segmenter.safetensors"), network.state_dict())
    for name in ("../0", "/etc/0", ""):
        with pytest.raises(DataError, match="no image in"):
            write_submission(run, ["0", name], photos, tmp_path / "results.zip")
    assert not (tmp_path / "results.zip").exists()
    write_submission(run, ["0", "2"], photos, tmp_path / "results.zip")
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        folder = "results/VOC2012/Segmentation/comp6_test_cls"
        assert archive.namelist() == [f"{folder}/0.png", f"{folder}/2.png"]
        mask = Image.open(io.BytesIO(archive.read(f"{folder}/2.png")))
        assert mask.mode == "P" and mask.size == (14, 8)
        image = torch.from_numpy(np.array(Image.open(photos / "2.jpg"))).permute(2, 0, 1)
        assert np.array_equal(np.array(mask), segment(network, image, config.segmentation).numpy())
    with pytest.raises(DataError, match=r"no image in .* for 9 \(1 of"):
        write_submission(run, ["0", "9"], photos, tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()
