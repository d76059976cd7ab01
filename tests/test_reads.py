"""What is recorded of a config's reads, on the settings of the mini run."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from smaflib.config import Config, StageConfig, config_differences, dump_config, load_config
from smaflib.config_reads import follow, recorded_settings, recording, settings_at
from smaflib.files import PROJECT_ROOT
from smaflib.runs import open_run

MINI = PROJECT_ROOT / "configs" / "mini.yaml"


def reads_of(path: Path, read: Callable[[Config], object]) -> list[str]:
    """The lines that some reads of a followed config leave."""
    with recording(path):
        config = load_config(MINI)
        follow(config)
        read(config)
    return path.read_text().splitlines()


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda config: config.seed, ["seed"]),
        (lambda config: [config.attention.fusion for _ in range(3)], ["attention.fusion"]),
        (lambda config: config.attention.single_scale, ["attention.scales"]),  # a property reads settings
        (lambda config: config.segmentation.model, ["segmentation.model"]),  # None: there is no group to go into
        (lambda config: config.pseudo_masks.refinement, ["pseudo_masks.refine"]),
        (lambda config: config.pseudo_masks.refinement.labels, ["pseudo_masks.refine", "pseudo_masks.crf.labels"]),
        (lambda config: config.model_copy(update={"seed": 1}).seed, ["seed"]),
        (
            lambda config: (
                config.model_copy(
                    update={"attention": config.attention.model_copy(update={"bg_score": 0.5})}
                ).attention.bg_score
            ),
            ["attention.bg_score"],
        ),
        (lambda config: pickle.dumps(config.segmentation), ["segmentation"]),
        (lambda config: config.pseudo_masks.crf.model_dump(), ["pseudo_masks.crf"]),
        (lambda config: config.model == load_config(MINI).model, ["model"]),
        (dump_config, [""]),
        (lambda config: load_config(MINI).attention.fusion, []),  # not followed
        (lambda config: config_differences(load_config(MINI), load_config(MINI)), []),
    ],
)
def test_what_is_read_of_a_followed_config_is_noted_once(read, expected, tmp_path):
    assert reads_of(tmp_path / "reads", read) == expected


def test_opening_a_run_reads_nothing_and_its_config_is_followed(tmp_path):
    open_run(tmp_path / "run", MINI)
    with recording(tmp_path / "reads"):
        run = open_run(tmp_path / "run", MINI)
        assert (tmp_path / "reads").read_text() == ""
        assert dataclasses.replace(run).config.data.kind == "mini"
    assert (tmp_path / "reads").read_text() == "data.kind\n"


def test_settings_are_plain_attributes_again_afterwards(tmp_path):
    reads_of(tmp_path / "reads", lambda config: config.seed)
    config = load_config(MINI)
    follow(config)
    assert config.model_copy().seed == 0
    assert "__getattribute__" not in vars(StageConfig) and (tmp_path / "reads").read_text() == "seed\n"


def test_values_are_those_of_the_run(tmp_path):
    path = tmp_path / "reads"
    config = load_config(MINI, ["seed=7", "evaluation.paper_results={student: 1.5}"])
    assert recorded_settings(path, config) == {}
    path.write_text("seed\nevaluation.paper_results\nseed\nsegmentation.model\n")
    values = {"evaluation.paper_results": {"student": 1.5}, "seed": 7, "segmentation.model": None}
    assert recorded_settings(path, config) == values
    assert settings_at(["gone.setting", "segmentation.model.backbone", "seed"], config) == {"seed": 7}
    everything = config.model_dump(mode="json")
    assert everything.pop("processes") == "auto"  # decides no result
    assert settings_at([""], config) == {"": everything}
