"""Bad input for every command: one sentence that names what is wrong, exit code 1 or 2, and nothing left behind.

Damaged files of finished runs are in test_cli.py, of COCO in test_data_coco.py, of attention maps in test_cams.py.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.config import Config, load_config
from smaflib.data.labels import read_label_rows
from smaflib.data.tools.cls_labels import read_cls_labels
from smaflib.errors import ConfigError, DataError, RunError
from smaflib.maps import AttentionMaps
from smaflib.models.weights import read_weights
from smaflib.runs.manifest import read_manifest


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *words: object, naming: object) -> str:
    """Call a command that must refuse its input; the message."""
    before = tree(folder)
    result: Result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.stderr and isinstance(result.exception, SystemExit), result.exception
    assert 20 < len(result.stderr) < 2600
    assert all(character.isprintable() or character == "\n" for character in result.stderr)
    # A box around typer's own messages breaks their lines.
    assert str(naming) in result.stderr or str(naming) in "".join(result.stderr.split("\n")), result.stderr
    assert tree(folder) == before
    return result.stderr


# --- settings ---------------------------------------------------------------------------------------------------------


def numeric_settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Keys of all settings that are numbers or tuples of numbers, from the schema."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        flat = str(field.annotation)
        if inner:
            yield from numeric_settings(inner[0], f"{prefix}{name}.")
        elif ("int" in flat or "float" in flat) and "bool" not in flat and get_origin(field.annotation) is not dict:
            yield f"{prefix}{name}"


NUMBERS = sorted(numeric_settings())
NO_NUMBERS = (".nan", ".inf", "-.inf", "word", "{a: 1}", "[[1]]", "1" * 5000, "-1e300", "2001-13-45")


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: value[:12])
@pytest.mark.parametrize("key", NUMBERS)
def test_settings_that_are_no_numbers_are_named(key: str, value: str) -> None:
    """``auto`` and null are for some settings what they are; a number beyond all bounds is for none."""
    group = "segmentation.test_crf" if key.startswith("segmentation.test_crf.") else ""
    with pytest.raises(ConfigError) as caught:
        load_config("configs/mini.yaml", ([f"{group}=reference"] if group else []) + [f"{key}={value}"])
    message = str(caught.value)
    assert len(message) < 2000 and (key in message or "valid YAML" in message)


@pytest.mark.parametrize(
    "setting",
    [
        "attention.scales=[1e9]",
        "attention.scales=[]",
        "attention.scales=[0]",
        "attention.bg_score=0",
        "attention.bg_score=1.5",
        "classifier.batch_size=1000000",
        "classifier.resize_range=[1,1]",
        "classifier.resize_range=[300,200]",
        "classifier.color_jitter=[0,0,0,0.9]",
        "classifier.crop_size=0",
        "classifier.head_multiplier=-3",
        "self_training.loss_weight=-1",
        "pseudo_masks.crf.bilateral_sxy=1e-30",
        "pseudo_masks.crf.gt_prob=1",
        "pseudo_masks.crf=unheard_of",
        "evaluation.size_limits=[0.5,0.1]",
        "evaluation.thresholds=[]",
        "seed=-1",
        "num_threads=-1",
        "model.output_stride=7",
        "data.num_workers=100000",
        "data.image_size=1",
        "unknown=1",
        "classifier.iteration=1",
        "classifier=5",
        "=5",
        "seed",
        "",
    ],
)
def test_settings_out_of_bounds_are_refused_before_anything_is_written(tmp_path: Path, setting: str) -> None:
    key = setting.partition("=")[0]
    refused(tmp_path, "run", "configs/mini.yaml", "--runs", tmp_path, "--set", setting, naming=key.split(".")[-1])


# --- names and paths --------------------------------------------------------------------------------------------------

NAMES = ["..", ".", "", "../escaped", "/tmp/escaped", "a/b", "a\\b", "x" * 300, "a\nb", " ", "a\x1b[31m", "-"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("command", ["run", "ablate"])
def test_names_of_runs_that_lead_elsewhere_are_refused(tmp_path: Path, command: str, name: str) -> None:
    refused(
        tmp_path,
        command,
        "configs/mini.yaml",
        "--runs",
        tmp_path / "runs",
        f"--name={name}",
        naming="must be a plain folder name",
    )


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize(
    "name", ["nothing", "/dev/null", "x" * 5000, "a\0b", "..", ""], ids=lambda name: repr(name)[:12]
)
def test_runs_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # a name may be a path, and the folder above the checkout may hold anything
    refused(tmp_path, command, name, "--runs", tmp_path, naming="error")


# --- tables of labels -------------------------------------------------------------------------------------------------

TABLES: list[tuple[bytes, str]] = [
    (b"", "an empty file"),
    (b"\n\n", "an empty file"),
    (b"image\na.png\n", "image,labels"),
    (b"image;labels\na.png;cat\n", "image,labels"),
    (b"image,labels\n", "lists no image"),
    (b"image,labels\na.png,\n", "line 2"),
    (b"image,labels\n,cat\n", "line 2"),
    (b"image,labels\na.png,cat,dog\n", "line 2"),
    (b"image,labels\na.png,cat\na.png,dog\n", "a.png"),
    (b"image,labels\nmissing.png,cat\n", "missing.png"),
    (b"image,labels\n../photos/a.png,cat\n", "../photos/a.png"),
    (b"image,labels\n/etc/passwd,cat\n", "/etc/passwd"),
    (b"image,labels\na.png,<img src=x onerror=alert(1)>\n", "no usable name"),
    (b"image,labels\na.png,$\\href{x}{y}$\n", "no usable name"),
    (b"image,labels\na.png,\x1b[2Jcat\n", "no usable name"),
    (b"image,labels\na.png,background\n", "background"),
    (b"image,labels\na.png," + b"c" * 5000 + b"\n", "no usable name"),
    (b"image,labels\na.png," + b";".join(b"c%d" % n for n in range(300)) + b"\n", "300 classes"),
    (b'image,labels\n"a.png,cat\n', "line"),
    (b"image,labels\na.png,caf\xe9\n", "UTF-8"),
    (b"\xff\xfei\x00m\x00a\x00g\x00e\x00", "UTF-8"),
    (b"image,labels\na\x00.png,cat\n", "labels.csv"),
    (b"PK\x03\x04" + bytes(100), "labels.csv"),
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    return folder


@pytest.mark.parametrize(("content", "message"), TABLES, ids=lambda value: repr(value)[:40])
def test_tables_of_labels_are_checked_before_anything_is_learned(
    photos: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    words = ["masks", "--images", photos, "--labels", table, "--out", tmp_path / "out"]
    refused(tmp_path, *words, "--backbone", "slim", "--set", "model.weights=null", naming=message)


def eps_picture() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\nshowpage\n"


def encoded(picture: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind)
    return content.getvalue()


RED = Image.new("RGB", (40, 30), "red")
PICTURES = {
    "empty": b"",
    "text": b"dear sir",
    "eps": eps_picture(),
    "gif": encoded(RED, "GIF"),
    "bmp": encoded(RED, "BMP"),
    "cut png": encoded(RED, "PNG")[:60],
    "cut jpeg": encoded(RED, "JPEG")[:200],
    "huge": encoded(Image.new("1", (13_000, 13_000)), "PNG"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_photos_that_are_none_are_named(photos: Path, tmp_path: Path, kind: str) -> None:
    (photos / "b.png").write_bytes(PICTURES[kind])
    (tmp_path / "labels.csv").write_text("image,labels\nb.png,cat\na.png,dog\n")
    words = ["data", "check", "configs/custom.yaml", "--set", f"data.images={photos}"]
    before = tree(tmp_path)
    result = CliRunner().invoke(app, [*map(str, words), "--set", f"data.labels={tmp_path / 'labels.csv'}"])
    assert result.exit_code == 1 and "b.png" in result.output and "Traceback" not in result.output
    assert tree(tmp_path) == before


# --- weights ----------------------------------------------------------------------------------------------------------


def checkpoint() -> bytes:
    content = io.BytesIO()
    torch.save({"layer.weight": torch.ones(2, 3)}, content)
    return content.getvalue()


def params(count: int, shape: tuple[int, ...], values: bytes, name: bytes = b"arg:conv1a_weight") -> bytes:
    array = struct.pack("<IiI", 0xF993FAC9, 0, len(shape)) + struct.pack(f"<{len(shape)}q", *shape)
    array += struct.pack("<iii", 1, 0, 0) + values
    return struct.pack("<QQQ", 0x112, 0, count) + array + struct.pack("<QQ", 1, len(name)) + name


class Evil:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/smaflib_was_here"),))


def evil_checkpoint() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3\n")
    return content.getvalue()


def holds_itself() -> bytes:
    table: dict[str, Any] = {}
    table["a.b"] = table
    return pickle.dumps(table, 2)


WHOLE = save({"layer.weight": torch.ones(2, 3)})
WEIGHTS = {
    "empty": b"",
    "text": b"no weights at all",
    "header of 2 exabytes": struct.pack("<Q", 2**61) + b"{}",
    "header that is no JSON": struct.pack("<Q", 4) + b"{{{{",
    "offsets beyond the end": struct.pack("<Q", 65)
    + b'{"a.b":{"dtype":"F32","shape":[999],"data_offsets":[0,3996]}}    ',
    "cut safetensors": WHOLE[:-5],
    "pickle of a function": evil_checkpoint(),
    "pickle that holds itself": holds_itself(),
    "old pickle, cut": b"\x80\x02}q\x00X\x05",
    "params of a billion arrays": struct.pack("<QQQ", 0x112, 0, 10**9),
    "params of a negative side": params(1, (-1,), b""),
    "params of a huge side": params(1, (2**40, 2**40), b""),
    "params of a side of 0": params(1, (0,), b""),
    "params of 4 billion dimensions": struct.pack("<QQQIiI", 0x112, 0, 1, 0xF993FAC9, 0, 2**32 - 1),
    "params without names": params(1, (1,), bytes(4))[:-20],
    **{f"checkpoint cut at {end}": checkpoint()[:end] for end in range(1, len(checkpoint()) - 1, 97)},
    **{f"safetensors cut at {end}": WHOLE[:end] for end in range(1, len(WHOLE), 13)},
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_damaged_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(WEIGHTS[kind])
    if kind == "params of a side of 0":  # a whole file, of an array that no network has
        assert CliRunner().invoke(app, ["weights", "inspect", str(path)]).exit_code in (0, 1, 2)
        return
    refused(tmp_path, "weights", "inspect", path, naming="weights.bin")
    assert not Path("/tmp/smaflib_was_here").exists()


# --- cls_labels.npy ---------------------------------------------------------------------------------------------------


def npy(content: bytes, shape: str = "()", kind: str = "'|O'") -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (10 + len(header)) % 64 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


LABELS = {
    "empty": b"",
    "no npy": b"PK\x03\x04",
    "numbers": npy(bytes(8), "(1,)", "'<f8'"),
    "an array of a trillion": npy(bytes(8), "(1000000000000,)", "'<f8'"),
    "no pickle": npy(b""),
    "cut pickle": npy(pickle.dumps({"a": np.ones(20)})[:40]),
    "a list": npy(pickle.dumps([1, 2])),
    "a function": npy(pickle.dumps(Evil())),
    "text instead of vectors": npy(pickle.dumps({"a": "cat"})),
    "holds itself": npy(holds_itself()),
    "vectors of two lengths": npy(pickle.dumps({"a": np.ones(20), "b": np.ones(19)})),
    "other numbers": npy(pickle.dumps({"a": np.full(20, 7.0)})),
    "other classes": npy(pickle.dumps({"a": np.ones(3)})),
    "vectors of no number": npy(pickle.dumps({"a": []})),
    "rows of two lengths": npy(pickle.dumps({"a": [1, [0, 1]]})),
    "no image": npy(pickle.dumps({})),
    "claims 4 GB of text": npy(b"\x80\x04\x8d" + struct.pack("<Q", 2**62)),
    "header that is code": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"__import__('os')    ",
}


@pytest.mark.parametrize("kind", LABELS)
def test_cls_labels_that_are_damaged_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cls_labels.npy"
    path.write_bytes(LABELS[kind])
    refused(tmp_path, "data", "labels", path, "--out", tmp_path / "labels.csv", naming="cls_labels.npy")
    assert not Path("/tmp/smaflib_was_here").exists()


# --- found by chance --------------------------------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
BUDGET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@BUDGET
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda text: b"image,labels\n" + text.encode())
    )
)
def test_any_bytes_are_a_table_or_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    try:
        rows = read_label_rows(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert rows and all(row.image and row.labels for row in rows)


@BUDGET
@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_is_settings_or_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path)
    except ConfigError as error:
        assert len(str(error)) < 3000


@BUDGET
@given(
    content=st.binary(max_size=300), kind=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", struct.pack("<Q", 0x112)])
)
def test_any_bytes_are_weights_or_an_error(tmp_path: Path, content: bytes, kind: bytes) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(kind + content)
    try:
        state = read_weights(path)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(value, torch.Tensor) for value in state.values())


@BUDGET
@given(value=ANY_JSON)
def test_any_json_is_a_file_of_instances_or_an_error(tmp_path: Path, value: Any) -> None:
    from smaflib.data.coco import read_instances

    (tmp_path / "annotations").mkdir(exist_ok=True)
    path = tmp_path / "annotations" / "instances_any.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="is no complete file of COCO instances"):
        read_instances(tmp_path, "any")


@pytest.fixture(scope="module")
def stored_maps(tmp_path_factory: pytest.TempPathFactory) -> AttentionMaps:
    maps = AttentionMaps(tmp_path_factory.mktemp("maps"), (0.5, 1.0))
    maps.write("a", [torch.rand(3, 2, 3), torch.rand(3, 4, 5)], (8, 10))
    return maps


@BUDGET
@given(data=st.data())
def test_any_change_of_a_file_of_maps_is_maps_or_an_error(stored_maps: AttentionMaps, data: st.DataObject) -> None:
    content = bytearray(stored_maps.path("a").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    stored_maps.path("b").write_bytes(content[: data.draw(st.sampled_from([cut, len(content)]))])
    try:
        cams, (height, width) = stored_maps.read("b")
    except DataError as error:
        assert str(stored_maps.path("b")) in str(error)
    else:
        assert len(cams) == 2 and height > 0 and width > 0


@BUDGET
@given(value=ANY_JSON)
def test_any_json_is_a_manifest_or_an_error(tmp_path: Path, value: Any) -> None:
    for content in (value, {"stages": value}, {"stages": {"01_data": value}}, {"config_hash": value}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        try:
            stages = read_manifest(tmp_path)["stages"]
        except RunError as error:
            assert str(tmp_path / "manifest.json") in str(error)
        else:
            assert all("status" in entry for entry in stages.values())


@BUDGET
@given(header=ANY_JSON, length=st.none() | st.integers(0, 2**64 - 1), values=st.binary(max_size=40))
def test_any_header_is_safetensors_or_an_error(tmp_path: Path, header: Any, length: int | None, values: bytes) -> None:
    text = json.dumps({"layer.weight": header} if not isinstance(header, dict) else header).encode()
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + values)
    try:
        read_weights(path)
    except ConfigError as error:
        assert str(path) in str(error)


@BUDGET
@given(value=ANY_JSON, cut=st.integers(0, 80))
def test_any_pickle_is_image_labels_or_an_error(tmp_path: Path, value: Any, cut: int) -> None:
    path = tmp_path / "cls_labels.npy"
    content = npy(pickle.dumps({"2007_000001": value} if cut % 2 else value))
    path.write_bytes(content[: len(content) - cut] if cut > 40 else content)
    try:
        labels, num_classes = read_cls_labels(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert labels and all(max(numbers, default=0) < num_classes for numbers in labels.values())
