"""Settings: which are refused, and whether the message helps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from smaflib.config import (
    Config,
    CrfConfig,
    DataConfig,
    check_settings,
    config_differences,
    dump_config,
    flat_settings,
    load_config,
)
from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT

CONFIGS = sorted((PROJECT_ROOT / "configs").glob("*.yaml"))
MINI = PROJECT_ROOT / "configs" / "mini.yaml"


def check(**groups: Any) -> Config:
    return check_settings({"data": {"kind": "mini"}} | groups)


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_reference_on_voc() -> None:
    config = check()
    assert config.attention.scales == (0.5, 1.0, 1.5, 2.0) and config.attention.flip
    assert config.attention.bg_score == 0.2 and config.attention.fusion == "sum"
    assert (config.classifier.iterations, config.classifier.batch_size, config.classifier.crop_size) == (20_000, 8, 448)
    assert (config.classifier.learning_rate, config.classifier.momentum) == (0.01, 5e-4)
    assert config.self_training.loss_weight == 100.0 and config.self_training.color_jitter == (0, 0, 0, 0)
    crf = config.pseudo_masks.crf
    assert (crf.iterations, crf.gt_prob, crf.gaussian_sxy, crf.gaussian_compat) == (10, 0.7, 3, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_compat) == (50, 5, 10)
    assert (config.segmentation.learning_rate, config.segmentation.momentum) == (2.5e-4, 0.9)
    assert config.evaluation.thresholds[2] == 0.15 and len(config.evaluation.thresholds) == 16
    assert DataConfig().kind == "voc"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_names_settings_that_exist(path: Path) -> None:
    load_config(path)
    known = flat_settings(check(segmentation={"model": {}, "test_crf": {}}))
    groups = "|".join({key.partition(".")[0] for key in known if "." in key})
    comments = "\n".join(line.partition("#")[2] for line in path.read_text(encoding="utf-8").splitlines())
    for name in re.findall(rf"\b(?:{groups})(?:\.[a-z_]+)+", comments):
        assert any(f"{key}.".startswith(f"{name}.") for key in known), name


# --- what is refused --------------------------------------------------------------------------------------------------

UNKNOWN = {
    "clasifier={}": "classifier",
    "classifier.iteration=3": "classifier.iterations",
    "pseudo_masks.crf.gt_probs=0.5": "pseudo_masks.crf.gt_prob",
    "segmentation.test_crf.iteration=1": "segmentation.test_crf.iterations",
    "segmentation.model.backbon=slim": "segmentation.model.backbone",
    "bg_score=0.3": "attention.bg_score",  # the right name in the wrong place
    "attention.size_limits=[0, 1]": "evaluation.size_limits",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_the_closest_setting_is_suggested(override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"there is no setting {name}; did you mean {UNKNOWN[override]}\?"):
        load_config(MINI, [override])


REFUSED = {
    "classifier.iterations=banana": r"classifier\.iterations: .*integer.*got 'banana'",
    "classifier.iterations=2.5": "integer",
    "classifier.learning_rate=.inf": "finite",
    "classifier.optimizer=adam": "'sgd' or 'adamw'",
    "classifier.resize_range=[512, 256]": r"must be \(smaller, larger\), got \[512, 256\]",
    "classifier=3": "dictionary.*got 3",
    "attention.scales=[0]": r"attention\.scales\.0: .*greater",
    "attention.bg_score=0": "greater",
    "attention.bg_score=otsu": "'auto'",
    "attention.fusion=product": r"must be sum, mean, max, size_adaptive or package\.module:attribute",
    "attention.source=grad_cam": "must be classifier, imagenet, .* or package",
    "attention.caa=0.4": "needs the affinity of patches",
    "attention.options.prompts=[a photo]": "should match pattern",
    "data.kind=imagenet": "must be mini, voc, coco, folder or package",
    "pseudo_masks.refine=sam": "must be crf, par, none or package",
    "pseudo_masks.crf=fast": "no CRF preset 'fast'; choose one of reference, irn, deeplab, mini, soft",
    "pseudo_masks.crf.bilateral_sxy=1e-30": "greater",  # would be a segmentation fault
    "pseudo_masks.crf.bilateral_compat=-.inf": "finite|greater",
    "evaluation.size_limits=[0.5, 0.1]": "smaller, larger",
    "evaluation.paper_results={pseudo_mask: 73.9}": "pseudo_masks",
    "processes=0": "greater|'auto'",
    "precision=fp16": "'auto', 'float32' or 'bf16'",
    "seed=2001-13-45": "not valid YAML",
    "attention.scales=[1": "not valid YAML",
    "seed.x=1": "'seed' is not a group of settings",
    "classifier.iterations": "must look like key=value, got 'classifier.iterations'",
    "=3": "must look like key=value",
}


@pytest.mark.parametrize("override", REFUSED)
def test_values_that_do_not_fit_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){REFUSED[override]}") as caught:
        load_config(MINI, [override])
    assert override.partition("=")[0] in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"kind": "voc"}}, "data.root is not set"),
        ({"data": {"kind": "coco"}}, "data.root is not set"),
        ({"data": {"kind": "folder", "images": "photos"}}, "data.images and data.labels must be set"),
        ({"data": {"kind": "voc", "root": "x"}, "classifier": {"pretraining": "eps"}}, "data.saliency is not set"),
        ({"classifier": {"solve_head": {}}}, "solve_head needs model.freeze_backbone=true"),
        ({"segmentation": {"initial_weights": "student", "model": {}}}, "does not fit the backbone"),
        ({"segmentation": {"architecture": "deeplabv3", "skip_channels": 8}}, "is for deeplabv2"),
    ],
)
def test_settings_that_need_each_other(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**groups)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [1, ", "is not valid YAML"),
        (b"seed: \xff\xfe", "is not valid YAML: .*invalid start byte"),
        (b"- 1\n- 2\n", "must hold settings such as 'seed: 0', got a list"),
        (b"sed: 1\n", r"some\.yaml:\n  there is no setting sed; did you mean seed\?"),
        ("\n".join(f"data_{number}: 1" for number in range(5000)).encode(), "there is no setting data_0"),
    ],
)
def test_files_that_hold_no_settings(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value)) < 4000
    with pytest.raises(FileNotFoundError, match=r"no config file .*absent\.yaml; smaflib comes with those in configs/"):
        load_config(tmp_path / "absent.yaml")


PATHS = (
    "data.root",
    "data.images",
    "data.labels",
    "data.saliency",
    "data.masks",
    "model.weights",
    "segmentation.model.weights",
    "classifier.checkpoint",
)


@pytest.mark.parametrize("typed", ["~/set/x.txt", "$HOME/set/x.txt", "${HOME}/set/x.txt"])
def test_home_and_variables_are_replaced_in_every_path(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    more = [f"data.train_split={typed}", "segmentation.initial_weights=backbone"]
    config = load_config(MINI, [*more, *(f"{name}={typed}" for name in PATHS)])
    flat = flat_settings(config)
    assert {flat[name] for name in PATHS} == {"/home/ada/set/x.txt"}
    assert config.data.split_list("train") == Path("/home/ada/set/x.txt")
    assert flat_settings(load_config(MINI, ["model.weights=wheel"]))["model.weights"] == "wheel"


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "data: {kind: mini, root: here}\nclassifier: {iterations: 7}\n")
    overrides = (
        "classifier.iterations=9",
        "attention.scales=[1, 2]",
        "segmentation.test_crf.iterations=3",
        "model.weights=null",
        "segmentation.model={weights: some.pth}",
        "classifier.flip=false",
        "classifier.learning_rate=1e-3",  # YAML 1.1 reads this as a string
    )
    config = load_config(path, overrides)
    assert config.classifier.iterations == 9 and config.attention.scales == (1.0, 2.0)
    assert config.segmentation.test_crf == CrfConfig(iterations=3)
    assert config.model.weights is None and config.classifier.flip is False
    assert config.classifier.learning_rate == 1e-3
    assert config.data.root == PROJECT_ROOT / "here"
    assert config.segmentation.model is not None and config.segmentation.model.weights == f"{PROJECT_ROOT}/some.pth"
    off = write_yaml(tmp_path, "data: {kind: mini}\nsegmentation: {test_crf: null}\n")
    assert load_config(off, ["segmentation.test_crf.iterations=3"]).segmentation.test_crf == CrfConfig(iterations=3)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    scales=st.lists(st.floats(0.1, 4), min_size=1, max_size=4),
    weights=st.none() | st.text(st.characters(codec="ascii", exclude_categories=("C",)), min_size=1, max_size=8),
    crf=st.none() | st.builds(CrfConfig, iterations=st.integers(0, 20)),
)
def test_a_dumped_config_reads_back_equal(
    seed: int, scales: list[float], weights: str | None, crf: CrfConfig | None
) -> None:
    config = check(
        seed=seed,
        attention={"scales": scales},
        model={"weights": weights},
        segmentation={"test_crf": crf.model_dump() if crf else None},
        data={"kind": "mini", "root": "some/folder", "class_names": ["no", "2", "null"]},
    )
    assert check_settings(yaml.safe_load(dump_config(config))) == config


def test_differences_name_each_setting_that_changes_results() -> None:
    ours = check(seed=1, segmentation={"test_crf": {"iterations": 3}}, processes=2)
    theirs = check(classifier={"iterations": 5})
    assert flat_settings(ours)["segmentation.test_crf.iterations"] == 3
    assert flat_settings(ours)["attention.scales"] == [0.5, 1.0, 1.5, 2.0]
    lines = config_differences(ours, theirs)
    assert lines[:2] == ["seed: 1 | 0", "classifier.iterations: 20000 | 5"]
    assert all("segmentation.test_crf" in line for line in lines[2:]) and len(lines) > 2
    assert config_differences(ours, ours) == []


def test_a_preset_is_named_in_a_file_and_changed_by_an_override(tmp_path: Path) -> None:
    text = "data: {kind: mini}\npseudo_masks: {crf: irn}\nsegmentation: {test_crf: {preset: deeplab, iterations: 4}}\n"
    file = write_yaml(tmp_path, text)
    config = load_config(file)
    assert config.pseudo_masks.crf == CrfConfig(labels="present")
    assert config.segmentation.test_crf == CrfConfig.model_validate("deeplab").model_copy(update={"iterations": 4})
    changed = load_config(file, ["pseudo_masks.crf.iterations=3", "segmentation.test_crf=mini"])
    assert changed.pseudo_masks.crf == CrfConfig(labels="present", iterations=3)
    assert changed.segmentation.test_crf == CrfConfig.model_validate("mini")
    assert "preset" not in dump_config(changed)  # a run records the numbers
