"""The chain over a folder: each function once, resumed, and the same for notebooks, custom images and the ablation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_weights, tiny_config
from PIL import Image
from torch import Tensor

from smaflib import files
from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import ModelConfig, Variant
from smaflib.data import make_data
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import check_saliency_sizes
from smaflib.errors import DataError, InputError, MissingStage
from smaflib.evaluation import evaluate, masks_of
from smaflib.maps import FusedMaps, MaskMaps, SaliencyMaps
from smaflib.pipeline import (
    Workspace,
    attend,
    check_networks,
    evaluate_network,
    resolve_bg_score,
    resolve_mask_bg_score,
    self_train_rounds,
    train_segmentation,
    train_student,
    train_teacher,
    write_maps,
    write_masks,
    write_segmentation,
)
from smaflib.pseudo_masks import pseudo_mask, pseudo_masks
from smaflib.reactivation import blend_saliency, denoise, hard_labels, reactivate
from smaflib.runtime import Runtime
from smaflib.thresholds import choose_bg_score


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
    resolve_bg_score(work)
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


def test_everything_lies_where_the_workspace_says(done: Workspace) -> None:
    made = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    ids = done.samples().image_ids
    assert {f"checkpoints/{name}.safetensors" for name in ("teacher", "student", "segmenter")} <= made
    assert {f"cams/{name}/{image_id}.npz" for name in ("teacher", "student") for image_id in ids} <= made
    assert {f"masks/{image_id}.png" for image_id in ids} <= made
    assert {"bg_scores/teacher.json", "bg_scores/student.json"} <= made
    assert len(done.masks(done.samples("val"), "masks_segmenter")) == 2
    assert done.maps("student", "val").folder.name == "student_val"


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


def test_missing_maps_are_made_again_alike_and_the_others_stay(copy: Workspace) -> None:
    maps = copy.maps("teacher")
    first, second = (maps.path(image_id) for image_id in copy.samples().image_ids[:2])
    whole, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    write_maps(copy, "teacher")
    assert first.read_bytes() == whole and second.stat().st_mtime_ns == kept


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


def test_masks_are_the_pseudo_masks_of_the_students_maps(done: Workspace) -> None:
    samples = done.samples()
    for sample, maps, mask in zip(samples, done.denoised("student", samples), done.masks(samples), strict=True):
        assert torch.equal(mask, pseudo_mask(sample.image, maps, done.bg_score, done.config.pseudo_masks))


def test_each_rounds_student_is_the_next_rounds_teacher(copy: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    work = changed(copy, self_training={"rounds": 2})
    work.checkpoint("student").unlink()
    taught: list[Any] = []
    original = __import__("smaflib.self_training").self_training.self_train

    def note(teacher: Any, samples: Any, denoised: FusedMaps, *rest: Any, **options: Any) -> Any:
        taught.append((teacher, denoised.maps.folder.name))
        return original(teacher, samples, denoised, *rest, **options)

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

    # With refine the targets are the masks that the CRF, or code of somebody's own, makes of the maps.
    code = "def upside_down(image, scores): return scores.flip(1)"
    (copy.folder / "own_targets.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(copy.folder))
    samples, made = copy.samples(), {}
    for refine in ("crf", "par", "own_targets:upside_down"):
        work = changed(copy, self_training={"refine": refine}, pseudo_masks={"refine": "none", "num_workers": 1})
        train_student(work, "another")
        refined = taught[-1][0]
        assert isinstance(refined, MaskMaps)
        settings = work.config.pseudo_masks.model_copy(update={"refine": refine})
        made[refine] = list(pseudo_masks(samples, work.denoised("teacher", samples), work.bg_score, settings))
        for maps, mask in zip(refined, made[refine], strict=True):
            assert torch.equal(maps, torch.stack([(mask == k + 1).float() for k in range(len(maps))]))
    by_hand = [hard_labels(maps, copy.bg_score).flip(0) for maps in copy.denoised("teacher", samples)]
    assert all(map(torch.equal, made["own_targets:upside_down"], by_hand))
    assert not all(map(torch.equal, made["crf"], by_hand))


def test_targets_are_refined_on_the_runs_device(copy: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []

    def note(samples: Any, maps: Any, bg_score: float, settings: Any, *, device: torch.device, desc: str) -> list[Any]:
        devices.append(device)
        return [torch.zeros(1, 1, dtype=torch.uint8)] * len(samples)

    monkeypatch.setattr("smaflib.pseudo_masks.pseudo_masks", note)
    monkeypatch.setattr("smaflib.self_training.self_train", lambda *_, **__: (None, []))
    monkeypatch.setattr("smaflib.runtime.make_runtime", lambda config: Runtime(torch.device("meta")))
    train_student(changed(copy, self_training={"refine": "crf"}), "another")
    assert devices == [torch.device("meta")]


def test_auto_is_resolved_once_from_the_teachers_maps_and_stored(copy: Workspace) -> None:
    work = changed(copy, attention={"bg_score": "auto"}, pseudo_masks={"bg_score": None})
    work.path("bg_scores", "teacher.json").unlink()
    with pytest.raises(MissingStage, match="stage 03 resolves it"):
        _ = work.bg_score
    chosen = resolve_bg_score(work)
    assert chosen == choose_bg_score(work.denoised("teacher", work.samples())) == work.bg_score
    assert files.read_json(work.path("bg_scores", "teacher.json"), {}) == {"bg_score": chosen}
    # What is stored counts, whatever the maps would say now.
    files.write_json(work.path("bg_scores", "teacher.json"), {"bg_score": 0.55})
    assert resolve_bg_score(work) == work.bg_score == 0.55
    work.path("bg_scores", "student.json").unlink()
    assert resolve_mask_bg_score(work) == choose_bg_score(work.denoised("student", work.samples()))
    eps = changed(work, classifier={"pretraining": "eps"})
    eps.path("bg_scores", "student.json").unlink()
    by_saliency = choose_bg_score(eps.denoised("student", eps.samples()), SaliencyMaps(eps.samples()))
    assert resolve_mask_bg_score(eps) == by_saliency
    fixed = changed(copy, attention={"bg_score": "auto"}, pseudo_masks={"bg_score": 0.45})
    assert resolve_mask_bg_score(fixed) == 0.45
    # The teacher's masks have a score of their own; that of the targets stays.
    assert resolve_mask_bg_score(fixed, "teacher") == 0.45
    assert files.read_json(work.path("bg_scores", "teacher_masks.json"), {}) == {"bg_score": 0.45}
    assert files.read_json(work.path("bg_scores", "teacher.json"), {}) == {"bg_score": 0.55}
    assert changed(copy, attention={"bg_score": 0.25}).bg_score == 0.25  # a number needs no file


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
    several, _ = evaluate_network(
        copy, "teacher", Variant.TEACHER_FUSED, scales=[0.5, 1.0], rule="max", bg_score=0.35, splits=["train"]
    )
    assert {(r.get("scale"), r.get("fusion")) for r in several} == {(None, "max")}
    samples = copy.samples()
    by_hand = masks_of(copy.denoised("teacher", samples, [0.5, 1.0], "max"), 0.35)
    metrics = evaluate(by_hand, samples.ground_truth or [], samples.class_names, copy.config.evaluation)
    assert metrics.miou in [r["value"] for r in several if r["class_name"] == "mean"]
    own, score = evaluate_network(copy, "teacher", Variant.TEACHER_FUSED, bg_score=0.35, splits=["train"])
    assert score == 0.35 and {r["fusion"] for r in own} == {copy.config.attention.fusion}


def test_importing_the_chain_imports_no_torch() -> None:
    code = "import sys, smaflib.pipeline; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_saliency_takes_part_in_targets_only_where_the_teacher_knows_it(copy: Workspace) -> None:
    def weights(work: Workspace) -> list[Tensor]:
        work.checkpoint("student").unlink(missing_ok=True)
        student, _ = train_student(work)
        return [parameter.detach() for parameter in student.parameters()]

    plain = weights(copy)
    work = changed(copy, self_training={"saliency_weight": 0.4})
    assert all(map(torch.equal, weights(work), plain))  # of a teacher that has learned from image labels alone
    eps = changed(work, classifier={"pretraining": "eps"})
    assert not all(map(torch.equal, weights(eps), plain))
    samples = eps.samples()
    maps = eps.denoised("teacher", samples)[0]
    blended = eps.denoised("teacher", samples, saliency_weight=0.4)[0]
    assert torch.equal(blended, blend_saliency(maps, SaliencyMaps(samples)[0], 0.4))


def test_saliency_takes_part_in_masks_only_where_the_teacher_knows_it(copy: Workspace) -> None:
    work = changed(copy, pseudo_masks={"saliency_weight": 0.4, "bg_score": "auto", "refine": "none"})
    eps, samples = changed(work, classifier={"pretraining": "eps"}), copy.samples()
    for kind, weight in ((work, 0.0), (eps, 0.4)):
        kind.path("bg_scores", "student.json").unlink(missing_ok=True)
        for mask in kind.path("masks").glob("*.png"):
            mask.unlink()
        by_hand = kind.denoised("student", samples, saliency_weight=weight)
        assert all(map(torch.equal, kind.mask_maps("student", samples), by_hand))
        masks, score = write_masks(kind), resolve_mask_bg_score(kind)
        assert score == choose_bg_score(by_hand, SaliencyMaps(samples) if kind is eps else None)
        assert all(torch.equal(mask, hard_labels(maps, score)) for mask, maps in zip(masks, by_hand, strict=True))
    # What becomes a target is another setting.
    assert torch.equal(eps.denoised("teacher", samples)[0], work.denoised("teacher", samples)[0])


# --- what is refused before anything is trained -----------------------------------------------------------------------


def test_saliency_maps_of_another_size_are_refused_before_the_teacher_is_trained(copy: Workspace) -> None:
    work = dataclasses.replace(copy, folder=copy.folder)  # has read nothing yet
    work.checkpoint("teacher").unlink()
    maps = sorted((copy.folder / "data").rglob("[Ss]aliency/*.png"))
    chosen = [path for path in maps if path.stem in work.samples().image_ids][:4]
    for path in chosen:
        with Image.open(path) as saliency:
            smaller = saliency.resize((40, 30))
        smaller.save(path)
    with pytest.raises(DataError, match="4 of 6 saliency maps are not of their image's size: ") as caught:
        train_teacher(changed(work, classifier={"pretraining": "eps"}))
    assert str(caught.value).count("is 40 x 30 pixels, its image 64 x 64") == 3
    assert str(chosen[0]) in str(caught.value) and not work.checkpoint("teacher").exists()


def test_upright_saliency_maps_of_turned_photos_are_fine(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (30, 40)).save(tmp_path / "a.png")
    files = (SampleFiles("a", tmp_path / "a.jpg", (0,), tmp_path / "a.png"),)
    check_saliency_sizes(Samples(files, ("cat",), "train", lambda *_: pytest.fail("nothing needs to be decoded")))


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
