"""Settings: what is refused, and whether the message names the cure."""

from __future__ import annotations

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
from smaflib.data.classes import VOC_CLASSES
from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT

MINI = {"data": {"kind": "mini"}}


def check(**groups: Any) -> Config:
    return check_settings(MINI | groups)


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- constants of the method ------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_reference_on_voc() -> None:
    config = check()
    assert config.attention.scales == (0.5, 1.0, 1.5, 2.0) and config.attention.flip
    assert config.attention.bg_score == 0.2 and config.attention.fusion == "sum"
    assert (config.classifier.iterations, config.classifier.batch_size, config.classifier.crop_size) == (20_000, 8, 448)
    assert (config.classifier.learning_rate, config.classifier.momentum) == (0.01, 5e-4)
    assert config.self_training.loss_weight == 100.0 and config.self_training.color_jitter == (0, 0, 0, 0)
    assert config.pseudo_masks.crf == CrfConfig(
        iterations=10,
        gt_prob=0.7,
        gaussian_sxy=3,
        gaussian_compat=3,
        bilateral_sxy=50,
        bilateral_srgb=5,
        bilateral_compat=10,
    )
    assert (config.segmentation.learning_rate, config.segmentation.momentum) == (2.5e-4, 0.9)
    assert len(VOC_CLASSES) == 20 and VOC_CLASSES[14] == "person"


def test_default_thresholds_are_decimals_and_not_sums_of_floats() -> None:
    thresholds = check().evaluation.thresholds
    assert len(thresholds) == 16 and thresholds[2] == 0.15 and thresholds[-1] == 0.8


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        check().seed = 1  # type: ignore[misc]


# --- unknown names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "unknown", "meant"),
    [
        ({"clasifier": {}}, "clasifier", "classifier"),
        ({"classifier": {"iteration": 3}}, "classifier.iteration", "classifier.iterations"),
        ({"pseudo_masks": {"crf": {"gt_probs": 0.5}}}, "pseudo_masks.crf.gt_probs", "pseudo_masks.crf.gt_prob"),
        ({"segmentation": {"test_crf": {"iteration": 1}}}, "segmentation.test_crf.iteration", "iterations"),
        ({"bg_score": 0.3}, "bg_score", "attention.bg_score"),  # the right name in the wrong place
        ({"attention": {"size_limits": [0, 1]}}, "attention.size_limits", "evaluation.size_limits"),
    ],
)
def test_unknown_setting_is_refused_and_the_nearest_one_named(
    settings: dict[str, Any], unknown: str, meant: str
) -> None:
    with pytest.raises(ConfigError, match=rf"no setting {unknown}; did you mean [\w.]*{meant}\?"):
        check(**settings)


def test_settings_made_in_code_refuse_unknown_names_too() -> None:
    with pytest.raises(ValueError, match="iteration\n.*Extra inputs are not permitted"):
        CrfConfig(iteration=3)  # type: ignore[call-arg]


def test_unknown_setting_of_no_likeness_still_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="no setting xyzzy; did you mean "):
        check(xyzzy=1)


# --- values that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": {"iterations": "banana"}}, r"classifier\.iterations: .*integer.*got 'banana'"),
        ({"classifier": {"iterations": 0}}, r"classifier\.iterations: .*greater than 0"),
        ({"classifier": {"iterations": 2.5}}, r"classifier\.iterations: .*integer"),
        ({"classifier": {"learning_rate": -1}}, r"classifier\.learning_rate: .*greater than 0"),
        ({"classifier": {"momentum": 1.5}}, r"classifier\.momentum: .*less than or equal to 1"),
        ({"classifier": {"optimizer": "adam"}}, r"classifier\.optimizer: .*'sgd' or 'adamw'"),
        (
            {"classifier": {"resize_range": [512, 256]}},
            r"classifier\.resize_range: must be \(smaller, larger\), got \[512, 256\]",
        ),
        ({"classifier": {"color_jitter": [0.1]}}, r"classifier\.color_jitter"),
        ({"classifier": 3}, r"classifier: .*got 3"),
        ({"attention": {"scales": []}}, r"attention\.scales: .*at least 1"),
        ({"attention": {"scales": [0]}}, r"attention\.scales\.0: .*greater than or equal to 0\.05"),
        ({"attention": {"bg_score": 1.2}}, r"attention\.bg_score: .*less than or equal to 1"),
        ({"attention": {"fusion": "product"}}, r"attention\.fusion: .*size_adaptive"),
        ({"pseudo_masks": {"crf": {"gt_prob": 1}}}, r"pseudo_masks\.crf\.gt_prob: .*less than 1"),
        ({"model": {"output_stride": 4}}, r"model\.output_stride: .*8, 16 or 32"),
        ({"seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"precision": "fp16"}, r"precision: .*'auto', 'float32' or 'bf16'"),
        ({"device": "gpu"}, r"device: .*'auto', 'cpu', 'cuda' or 'mps'"),
        # An average over no scale and a sum over no branch have no value.
        ({"segmentation": {"test_scales": []}}, r"segmentation\.test_scales: .*at least 1"),
        ({"segmentation": {"aspp_dilations": []}}, r"segmentation\.aspp_dilations: .*at least 1"),
        ({"segmentation": {"test_scales": [0]}}, r"segmentation\.test_scales\.0: .*greater than or equal to 0\.05"),
        ({"evaluation": {"thresholds": []}}, r"evaluation\.thresholds: .*at least 1"),
    ],
)
def test_value_that_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**settings)


@pytest.mark.parametrize(
    "setting",
    [
        "attention.scales=[.inf]",
        "attention.scales=[1e9]",
        "attention.bg_score=0",
        "attention.bg_score=.nan",
        "classifier.batch_size=1000000",
        "classifier.resize_range=[1, 1]",
        "classifier.color_jitter=[0, 0, 0, 0.9]",
        "classifier.color_jitter=[-1, 0, 0, 0]",
        "classifier.head_multiplier=-3",
        "classifier.learning_rate=.inf",
        "classifier.poly_power=0",
        "classifier.weight_decay=.nan",
        "self_training.loss_weight=-1",
        "self_training.crop_size=2",
        "pseudo_masks.crf.bilateral_sxy=1e-30",  # ended in a segmentation fault
        "pseudo_masks.crf.gaussian_sxy=1e300",
        "pseudo_masks.crf.bilateral_compat=-.inf",
        "pseudo_masks.par.bandwidth=0",
        "segmentation.aspp_dilations=[100000]",
        "segmentation.test_scales=[.nan]",
        "evaluation.size_limits=[0.5, 0.1]",
        "evaluation.paper_results={pseudo_masks: 739}",
        "data.image_size=100000",
        "num_threads=1000000",
        f"classifier.iterations={10**30}",
    ],
)
def test_number_out_of_bounds_is_refused_in_a_few_words(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PROJECT_ROOT / "configs" / "mini.yaml", [setting])
    key = setting.partition("=")[0]
    assert key in str(caught.value) and len(str(caught.value)) < 2000


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: " + b"1" * 5000, "is not valid YAML: Exceeds the limit"),
        (b"seed: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        (b"seed: " + b"[" * 100_000, "is not valid YAML"),
        (b"seed: \xff\xfe", "is not UTF-8 text"),
        (b"seed: \x00", "is not valid YAML"),
        (BOMB.encode() + b"seed: *g", "there is no setting"),
        (BOMB.replace("a:", "seed:", 1).encode(), "there is no setting"),
        (b"seed: &a [*a, *a]", "is not valid YAML|valid integer"),
        (("".join(f"data_{number}: 1\n" for number in range(5000))).encode(), "there is no setting"),
    ],
)
def test_hostile_file_of_settings_is_refused_in_a_few_words(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value)) < 4000


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check(seed="x", classifier={"iterations": "y"})
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  seed: ") and lines[2].startswith("  classifier.iterations: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"kind": "voc"}}, "data.root is not set"),
        ({"data": {"kind": "folder", "images": "photos"}}, "data.images and data.labels must be set"),
        ({"data": {"kind": "voc", "root": "x", "label_source": "csv"}}, "data.labels is not set"),
        ({"data": {"kind": "voc", "root": "x"}, "classifier": {"pretraining": "eps"}}, "data.saliency is not set"),
    ],
)
def test_settings_that_need_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(settings)


def test_the_mini_set_brings_saliency_of_its_own() -> None:
    assert check(classifier={"pretraining": "eps"}).data.saliency is None


# --- files and overrides ----------------------------------------------------------------------------------------------


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "data: {kind: mini}\nclassifier: {iterations: 7}\n")
    overrides = (
        "classifier.iterations=9",
        "attention.scales=[1, 2]",
        "segmentation.test_crf.iterations=3",
        "model.weights=null",
        "classifier.flip=false",
        "classifier.learning_rate=1e-3",  # YAML 1.1 reads this as a string
    )
    config = load_config(path, overrides)
    assert config.classifier.iterations == 9 and config.attention.scales == (1.0, 2.0)
    assert config.segmentation.test_crf == CrfConfig(iterations=3)
    assert config.model.weights is None and config.classifier.flip is False
    assert config.classifier.learning_rate == 1e-3


def test_override_within_a_group_that_is_switched_off(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "data: {kind: mini}\nsegmentation: {test_crf: null}\n")
    assert load_config(path, ["segmentation.test_crf.iterations=3"]).segmentation.test_crf == CrfConfig(iterations=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classifier.iterations", "must look like key=value, got 'classifier.iterations'"),
        ("=3", "must look like key=value"),
        ("classifier.iteration=3", r"did you mean classifier\.iterations"),
        ("classifier.iterations=banana", r"classifier\.iterations: .*got 'banana'"),
        ("seed.x=1", "'seed' is not a group of settings"),
        ("attention.scales=[1", "is not valid YAML"),
    ],
)
def test_override_that_does_not_fit(tmp_path: Path, override: str, message: str) -> None:
    path = write_yaml(tmp_path, "data: {kind: mini}\nseed: 0\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_file_that_is_missing_or_no_settings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file .*absent\.yaml; smaflib comes with those in configs/"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(write_yaml(tmp_path, "data: [1, "))
    with pytest.raises(ConfigError, match="must hold settings such as 'seed: 0', got a list"):
        load_config(write_yaml(tmp_path, "- 1\n- 2\n"))


def test_message_names_the_file(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "sed: 1\n")
    with pytest.raises(ConfigError, match=r"some\.yaml:\n  there is no setting sed; did you mean seed\?"):
        load_config(path)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    scales=st.lists(st.floats(0.1, 4), min_size=1, max_size=4),
    weights=st.none() | st.text(st.characters(codec="ascii", exclude_categories=("C",)), min_size=1, max_size=8),
    crf=st.none() | st.builds(CrfConfig, iterations=st.integers(0, 20)),
)
def test_dumped_config_reads_back_equal(
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


def test_flat_settings_and_differences() -> None:
    ours = check(seed=1, segmentation={"test_crf": {"iterations": 3}})
    theirs = check(classifier={"iterations": 5})
    assert flat_settings(ours)["segmentation.test_crf.iterations"] == 3
    assert flat_settings(ours)["attention.scales"] == [0.5, 1.0, 1.5, 2.0]
    lines = config_differences(ours, theirs)
    assert lines[:2] == ["seed: 1 | 0", "classifier.iterations: 20000 | 5"]
    assert all("segmentation.test_crf" in line for line in lines[2:]) and len(lines) > 2
    assert config_differences(ours, ours) == []


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("configs/*.yaml")), ids=lambda path: path.name
)
def test_every_ready_config_is_valid(path: Path) -> None:
    load_config(path, ["data.root=somewhere"] if "root" not in path.read_text() else [])


def test_data_config_alone_needs_no_root() -> None:
    assert DataConfig().kind == "voc"


def test_a_preset_is_named_in_a_file_and_changed_by_a_setting(tmp_path: Path) -> None:
    text = "data: {kind: mini}\npseudo_masks: {crf: irn}\nsegmentation: {test_crf: {preset: deeplab, iterations: 4}}\n"
    file = write_yaml(tmp_path, text)
    config = load_config(file)
    assert config.pseudo_masks.crf == CrfConfig(labels="present")
    assert config.segmentation.test_crf == CrfConfig.model_validate("deeplab").model_copy(update={"iterations": 4})
    changed = load_config(file, ["pseudo_masks.crf.iterations=3", "segmentation.test_crf=mini"])
    assert changed.pseudo_masks.crf == CrfConfig(labels="present", iterations=3)
    assert changed.segmentation.test_crf == CrfConfig.model_validate("mini")
    # A run folder's config.yaml holds the numbers, whatever the preset's name will mean one day.
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(changed))
    assert "preset" not in written.read_text() and load_config(written) == changed


@pytest.mark.parametrize("setting", ["pseudo_masks.crf=fast", "pseudo_masks.crf.preset=fast"])
def test_an_unknown_preset_names_the_known_ones(tmp_path: Path, setting: str) -> None:
    with pytest.raises(
        ConfigError, match="there is no CRF preset 'fast'; choose one of reference, irn, deeplab, mini, soft"
    ):
        load_config(write_yaml(tmp_path, "data: {kind: mini}"), [setting])
