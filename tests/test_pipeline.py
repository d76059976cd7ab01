"""The chain over a folder: each function once, resumed, and the same for notebooks, custom images and the ablation."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_weights, tiny_config

from smaflib import files
from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import ModelConfig, Variant
from smaflib.data import make_data
from smaflib.errors import ConfigError, DataError, InputError
from smaflib.evaluation import evaluate, masks_of
from smaflib.maps import FusedMaps, SaliencyMaps
from smaflib.pipeline import (
    attend,
    check_custom,
    check_networks,
    evaluate_network,
    self_train_rounds,
    train_segmentation,
    train_student,
    train_teacher,
    write_maps,
    write_masks,
    write_segmentation,
)
from smaflib.pseudo_masks import pseudo_masks
from smaflib.reactivation import blend_saliency, denoise, hard_labels, reactivate
from smaflib.self_training import self_train
from smaflib.thresholds import choose_bg_score
from smaflib.workspace import Workspace


def tiny(folder: Path, **groups: Any) -> Workspace:
    config = tiny_config(data={"num_train": 6, "num_val": 2, "image_size": 64, "cache": True}, **groups)
    return Workspace(folder, config)


def changed(work: Workspace, **groups: dict[str, Any]) -> Workspace:
    """The same folder under other settings."""
    parts = {name: getattr(work.config, name).model_copy(update=update) for name, update in groups.items()}
    return Workspace(work.folder, work.config.model_copy(update=parts))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The whole chain on six images of 64 pixels."""
    work = tiny(tmp_path_factory.mktemp("work"), segmentation={"initial_weights": "student"})
    make_data(work.config, work.folder)
    train_teacher(work)
    write_maps(work, "teacher")
    self_train_rounds(work)
    write_masks(work)
    train_segmentation(work)
    write_segmentation(work)
    return work


@pytest.fixture
def copy(done: Workspace, tmp_path: Path) -> Workspace:
    import shutil

    shutil.copytree(done.folder, tmp_path / "copy")
    return dataclasses.replace(done, folder=tmp_path / "copy")


def test_calling_the_chain_again_changes_nothing(copy: Workspace) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.*") if path.suffix != ".json"}
    for _ in range(2):
        train_teacher(copy)
        write_maps(copy, "teacher")
        self_train_rounds(copy)
        write_masks(copy)
        write_segmentation(copy)
    after = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.*") if path.suffix != ".json"}
    checkpoints = {path for path in before if path.parent.name == "checkpoints"}
    assert {path: time for path, time in after.items() if path not in checkpoints} == {
        path: time for path, time in before.items() if path not in checkpoints
    }


def test_a_single_image_goes_the_same_way(done: Workspace) -> None:
    """The straight path by hand, ``attend``, and the stored maps of the split."""
    sample, attention, teacher = done.samples()[0], done.config.attention, done.network("teacher")
    cams = multi_scale_cams(teacher, sample.image, attention.scales)
    fused = fuse_cams(cams, (64, 64), attention.fusion, attention.scales)
    denoised = denoise(fused, sample.image_label)
    maps = attend(teacher, sample.image, sample.image_label, attention, 0.3)
    assert torch.equal(maps.fused, fused) and torch.equal(maps.denoised, denoised)
    assert torch.equal(maps.target, reactivate(denoised, 0.3))
    stored = done.denoised("teacher", done.samples())[0]  # in half precision
    torch.testing.assert_close(stored, denoised, rtol=0, atol=2e-3)
    student = attend(done.network("student"), sample.image, sample.image_label, attention, done.bg_score)
    assert student.denoised.shape == denoised.shape and not torch.equal(student.denoised, denoised)


def test_each_rounds_student_is_the_next_rounds_teacher(copy: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    work = changed(copy, self_training={"rounds": 2})
    work.checkpoint("student").unlink()
    taught: list[Any] = []

    def note(teacher: Any, samples: Any, denoised: FusedMaps, *rest: Any, **options: Any) -> Any:
        taught.append((teacher, denoised.maps.folder.name))
        return self_train(teacher, samples, denoised, *rest, **options)

    monkeypatch.setattr("smaflib.self_training.self_train", note)
    histories = self_train_rounds(work)
    assert list(histories) == ["student_round1", "student"]
    assert [folder for _, folder in taught] == ["teacher", "student_round1"]
    assert same_weights(taught[1][0], work.network("student_round1"))
    assert not same_weights(work.network("student"), work.network("student_round1"))


def test_targets_are_the_denoised_maps_of_all_scales_or_of_one(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Any] = []

    def note(teacher: Any, samples: Any, denoised: Any, settings: Any, bg_score: float, *_: Any, **__: Any) -> Any:
        taught.append((denoised, bg_score))
        return teacher, []

    monkeypatch.setattr("smaflib.self_training.self_train", note)
    for settings in ({}, {"fused": False}, {"denoise": False}):
        train_student(changed(copy, self_training=settings), "another")
    train_student(copy, "another", fused=False)
    assert taught.pop()[0].scales == [1.0]
    (fused, bg_score), (single, _), (noisy, _) = taught
    label = copy.samples()[0].image_label
    assert bg_score == copy.config.attention.bg_score
    assert fused.scales is None and single.scales == [1.0] and fused.cached  # as data.cache says
    assert (noisy[0][label == 0].amax(dim=(1, 2)) > 0.9).any() and not fused[0][label == 0].any()

    # A finished student needs no targets.
    train_student(copy, "student")
    assert taught.pop()[0] == []

    # With refine the targets are the masks that a refinement makes of the maps.
    samples = copy.samples()
    work = changed(copy, self_training={"refine": "crf"}, pseudo_masks={"refine": "none", "num_workers": 1})
    train_student(work, "another")
    settings = work.config.pseudo_masks.model_copy(update={"refine": "crf"})
    masks = list(pseudo_masks(samples, work.denoised("teacher", samples), work.bg_score, settings))
    for maps, mask in zip(taught[-1][0], masks, strict=True):
        assert torch.equal(maps, torch.stack([(mask == k + 1).float() for k in range(len(maps))]))


def test_auto_is_chosen_once_from_the_maps_and_stored(copy: Workspace) -> None:
    work = changed(copy, attention={"bg_score": "auto"}, pseudo_masks={"bg_score": None})
    chosen = work.bg_score
    assert chosen == choose_bg_score(work.denoised("teacher", work.samples()))
    stored = work.path("bg_scores", "teacher.json")
    assert files.read_json(stored, {}) == {"bg_score": chosen}
    files.write_json(stored, {"bg_score": 0.55})
    assert work.bg_score == 0.55  # what is stored counts, whatever the maps would say now
    assert work.mask_bg_score() == choose_bg_score(work.denoised("student", work.samples()))
    eps = changed(work, classifier={"pretraining": "eps"})
    eps.path("bg_scores", "student.json").unlink()
    by_saliency = choose_bg_score(eps.denoised("student", eps.samples()), SaliencyMaps(eps.samples()))
    assert eps.mask_bg_score() == by_saliency
    # The teacher's masks have another threshold than the targets.
    assert work.mask_bg_score("teacher") == chosen and work.bg_score == 0.55
    fixed = changed(copy, attention={"bg_score": 0.25}, pseudo_masks={"bg_score": 0.45})  # numbers need no file
    assert (fixed.bg_score, fixed.mask_bg_score()) == (0.25, 0.45)
    unmade = changed(work, attention={"bg_score": "auto", "scales": (3.0,)})
    stored.unlink()
    with pytest.raises(DataError, match="attention maps"):
        _ = unmade.bg_score


def test_full_supervision_learns_the_ground_truth(copy: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("smaflib.segmentation.train_segmenter", lambda samples, masks, *_, **__: given.append(masks))
    train_segmentation(copy)
    train_segmentation(changed(copy, segmentation={"supervision": "ground_truth"}))
    truth = copy.samples().ground_truth
    assert truth is not None
    assert torch.equal(given[0][0], copy.masks(copy.samples())[0]) and torch.equal(given[1][0], truth[0])


def test_networks_are_evaluated_at_the_training_splits_oracle_threshold(copy: Workspace) -> None:
    write_maps(copy, "teacher", "val")
    records, oracle = evaluate_network(copy, "teacher", Variant.TEACHER, scales=[1.0])
    means = {
        r["split"]: r["value"]
        for r in records
        if (r["metric"], r["class_name"], r.get("object_size", "all")) == ("iou", "mean", "all")
    }
    assert set(means) == {"train", "val"} and {r["scale"] for r in records} == {1.0}
    for split in ("train", "val"):
        samples = copy.samples(split)  # type: ignore[arg-type]
        truth = samples.ground_truth
        assert truth is not None and oracle is not None
        masks = masks_of(copy.denoised("teacher", samples, [1.0]), oracle)
        assert means[split] == evaluate(masks, truth, samples.class_names, copy.config.evaluation).miou
    copy._samples["val"] = copy.samples("val").subset([])  # a folder of custom images has no val
    assert evaluate_network(copy, "teacher", Variant.TEACHER, scales=[1.0])[1] == oracle
    own, score = evaluate_network(copy, "teacher", Variant.TEACHER_FUSED, rule="max", bg_score=0.35, splits=["train"])
    assert score == 0.35 and {r["fusion"] for r in own} == {"max"}


def test_saliency_chooses_the_threshold_only_where_the_teacher_knows_it(copy: Workspace) -> None:
    settings = {"saliency_weight": 0.4}
    work = changed(copy, self_training=settings, pseudo_masks=settings | {"bg_score": "auto", "refine": "none"})
    eps, samples = changed(work, classifier={"pretraining": "eps"}), copy.samples()
    blended = blend_saliency(eps.denoised("student", samples)[0], SaliencyMaps(samples)[0], 0.4)
    assert torch.equal(eps.mask_maps("student", samples)[0], blended)
    assert torch.equal(work.mask_maps("student", samples)[0], blended)
    without = dataclasses.replace(
        samples, files=tuple(dataclasses.replace(each, saliency=None) for each in samples.files)
    )
    assert not torch.equal(work.mask_maps("student", without)[0], blended)
    for kind in (work, eps):
        for path in [*kind.path("masks").glob("*.png"), *kind.path("bg_scores").glob("student.json")]:
            path.unlink()
        maps = kind.mask_maps("student", samples)
        masks, score = write_masks(kind), kind.mask_bg_score()
        assert score == choose_bg_score(maps, SaliencyMaps(samples) if kind is eps else None)
        assert all(torch.equal(mask, hard_labels(each, score)) for mask, each in zip(masks, maps, strict=True))


# --- what is refused before anything is trained -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"backbone": "timm/tf_efficientnet_lite7"}}, "timm/tf_efficientnet_lite"),
        ({"segmentation": {"model": ModelConfig(backbone="resnet5")}}, "resnet5"),
        ({"segmentation": {"model": ModelConfig(weights="gone.safetensors")}}, r"gone\.safetensors"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    check_networks(changed(tiny(tmp_path), segmentation={"enabled": True}).config)
    with pytest.raises(InputError, match=message):
        check_networks(changed(tiny(tmp_path), **settings).config)


# --- custom code ------------------------------------------------------------------------------------------------------

CUSTOM = """
import torch
from torch import nn

def rule(maps, scales): return maps.mean(dim=0)
def softmax(maps, scales): return maps.softmax(dim=1).sum(dim=0)
def too_small(maps, scales): return maps.sum(dim=0)[:, ::2]
def refine(image, scores): return scores - 1
class Source(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
    def forward(self, images):
        gradient, = torch.autograd.grad(self.network(images.requires_grad_()).sum(), images)
        return gradient.abs()[:, :2]
class Backbone(nn.Conv2d):
    num_features = 4
    def __init__(self, config): super().__init__(3, 5, 8, stride=8)
"""


@pytest.mark.parametrize(
    ("group", "setting", "name", "message"),
    [
        ("attention", "fusion", "rule", None),
        ("attention", "fusion", "softmax", "fused differently without the others"),
        ("attention", "fusion", "too_small", r"the shape \(2, 8, 12\), not \(2, 16, 12\)"),
        ("attention", "fusion", "gone", "cannot load own_code:gone: AttributeError"),
        ("attention", "source", "Source", None),
        ("pseudo_masks", "refine", "refine", "not finite and non-negative"),
        ("model", "backbone", "Backbone", "5 channels|num_features"),
    ],
)
def test_custom_code_is_called_once_before_a_run(
    group: str, setting: str, name: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_code.py").write_text(CUSTOM, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    config = tiny_config(**{group: {setting: f"own_code:{name}"}})
    if message is None:
        check_custom(config)
    else:
        with pytest.raises(ConfigError, match=rf"{group}\.{setting}: .*({message})"):
            check_custom(config)
