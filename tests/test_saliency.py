"""`smaf saliency`: with a stand-in for rembg, and, where rembg is installed, with a network of one layer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.data.voc import read_saliency

MEAN_OF_CHANNELS = (
    b'\x08\x08:s\n0\n\x01x\x12\x01y"\nReduceMean*\x0b\n\x04axes@\x01\xa0\x01\x07*\x0f\n\x08keepdims\x18\x01\xa0\x01\x02'
    b"\x12\x01gZ\x1d\n\x01x\x12\x18\n\x16\x08\x01\x12\x12\n\x02\x08\x01\n\x02\x08\x03\n\x03\x08\xc0\x02\n\x03\x08\xc0\x02"
    b"b\x1d\n\x01y\x12\x18\n\x16\x08\x01\x12\x12\n\x02\x08\x01\n\x02\x08\x01\n\x03\x08\xc0\x02\n\x03\x08\xc0\x02"
    b"B\x04\n\x00\x10\r"
)
"""ONNX of ``ReduceMean(x, axes=[1])`` for x (1, 3, 320, 320), U2-Net's input; ``\\xc0\\x02`` is 320 as a varint."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A photo with a white square at its left, stored on its side, and one in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "dog").mkdir(parents=True)
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 5:25] = 255
    Image.fromarray(pixels).save(folder / "dog" / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # turned to the left to be upright
    Image.fromarray(np.rot90(pixels, -1)).save(folder / "a.png", exif=exif)
    return folder


def smaf(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["saliency", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What a stand-in of rembg makes of any name: a session that finds red salient."""
    session = Mock()
    session.predict.side_effect = lambda photo: [photo.getchannel("R")]
    rembg, sessions = ModuleType("rembg"), ModuleType("rembg.sessions")
    rembg.new_session, rembg.sessions = Mock(return_value=session), sessions  # type: ignore[attr-defined]
    for name, module in {"rembg": rembg, "rembg.sessions": sessions, "onnxruntime": ModuleType("onnxruntime")}.items():
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    return session


def test_every_upright_photo_gets_a_map_once(photos: Path, session: Mock) -> None:
    out = photos / "saliency"  # which holds no photos
    code, output = smaf(photos, out)
    assert code == 0 and output.endswith(f"saliency maps of 2 photos: {out}")
    for name in ("a", "b"):
        found = read_saliency(out / f"{name}.png")
        assert found.shape == (40, 60) and found[10:30, 5:25].min() == 1 and found.sum() == 400
        with Image.open(out / f"{name}.png") as stored:
            assert stored.mode == "L"
    (out / "b.png").unlink()
    assert smaf(photos, out)[0] == 0 and (out / "b.png").is_file()
    assert session.predict.call_count == 3


def test_what_cannot_be_done_is_said_and_nothing_written(
    photos: Path, session: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = photos.parent / "out"
    sys.modules["rembg"].new_session.side_effect = OSError("no route to github.com")
    cure = "name u2net or isnet-general-use, which are downloaded, or an ONNX file"
    assert smaf(photos, out) == (2, f"error: --model isnet-general-use cannot be used: no route to github.com; {cure}")
    empty = photos.parent / "empty"
    empty.mkdir()
    assert smaf(empty, out) == (2, f"error: {empty} holds no photo outside of the folder of the maps, {out}")
    monkeypatch.setitem(sys.modules, "rembg", None)
    missing = 'error: smaf saliency needs the package rembg: pip install "smaflib[saliency]"'
    assert smaf(photos, out) == (2, missing)
    assert not out.exists()


@pytest.mark.parametrize("side", [320, 1024], ids=["u2net", "isnet"])
def test_a_network_from_a_file_sees_photos_at_its_size(photos: Path, side: int) -> None:
    pytest.importorskip("rembg", reason="the extra saliency is not installed")
    network = photos.parent / "network.onnx"
    network.write_bytes(MEAN_OF_CHANNELS.replace(b"\xc0\x02", b"\x80\x08") if side == 1024 else MEAN_OF_CHANNELS)
    assert smaf(photos, photos.parent / "out", "--model", network)[0] == 0
    for name in ("a", "b"):
        found = read_saliency(photos.parent / "out" / f"{name}.png")
        assert found.shape == (40, 60)
        assert found[12:28, 7:23].min() > 0.9 and found[:7].max() < 0.1 and found[:, 28:].max() < 0.1
    network.write_bytes(b"<!doctype html>")
    code, message = smaf(photos, photos.parent / "other", "--model", network)
    assert code == 2 and f"--model {network} cannot be used" in message and "or an ONNX file" in message
