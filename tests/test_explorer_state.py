"""The explorer's numbers, which can be worked out by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from smaflib.cams import multi_scale_cams
from smaflib.config import CrfConfig, PseudoMaskConfig, dump_config
from smaflib.data import Sample, make_data
from smaflib.errors import DataError, RunError
from smaflib.explorer.state import CURVE_SCORES, Gallery, PhotoGallery, Settings, explore
from smaflib.maps import AttentionMaps
from smaflib.models.networks import load_attention_network
from smaflib.models.pretrained import ASSETS, pretrained_config
from smaflib.pseudo_masks import pseudo_mask
from smaflib.runs import Run, open_run

# Two classes on a row of four pixels, at two scales; maps have the image's size, so nothing is interpolated.
FIRST = torch.tensor([[[0.8, 0.4, 0.0, 0.0]], [[0.0, 0.0, 0.2, 0.1]]])
SECOND = torch.tensor([[[0.0, 0.4, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.3]]])
CAMS = [FIRST, SECOND]
SCALES = (1.0, 2.0)
BOTH = Settings(class_number=0, image_label=(0, 1), weights=(1.0, 1.0), fusion="sum", bg_score=0.3)


def row_sample(ground_truth: list[int] | None = None) -> Sample:
    mask = None if ground_truth is None else torch.tensor([ground_truth], dtype=torch.uint8)
    return Sample("row", torch.zeros(3, 1, 4, dtype=torch.uint8), torch.tensor([1.0, 1.0]), None, mask)


def near(values: Tensor, expected: list[float]) -> bool:
    return torch.allclose(values.flatten(), torch.tensor(expected, dtype=torch.float32), atol=1e-4)


def test_from_scale_to_mask_by_hand() -> None:
    result = explore(row_sample([1, 1, 2, 0]), CAMS, SCALES, BOTH)
    assert near(result.scale_maps[0], [1, 0.5, 0, 0]) and near(result.scale_maps[1], [0, 1, 0, 0])
    # Sums: class 0 is .8 .8 0 0, class 1 is 0 0 .2 .4; each brought to a peak of 1.
    assert near(result.fused, [1, 1, 0, 0]) and near(result.denoised[1], [0, 0, 0.5, 1])
    assert near(result.target, [1, 1, 0, 0])
    assert result.mask.tolist() == [[1, 1, 2, 2]]
    # The ground truth says background for the last pixel: class 1 has one hit of two, the background none of one.
    assert result.iou is not None
    assert result.iou.tolist() == pytest.approx([0, 1, 0.5]) and result.miou == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "mask"),
    [
        ({"image_label": (0,)}, [1, 1, 0, 0]),
        ({"image_label": (0,), "denoise": False}, [1, 1, 2, 2]),
        ({"image_label": ()}, [0, 0, 0, 0]),
        # Class 0: .8 and .4 + .4 * .5 = .6, so .75 of the peak. Class 1: .2 and .1 + .3 * .5 = .25, so .8 and 1.
        ({"weights": (1.0, 0.5), "bg_score": 0.9}, [1, 0, 0, 2]),
        ({"weights": (1.0, 0.5), "bg_score": 0.9, "reactivate": False}, [1, 0, 0, 2]),
        ({"weights": (0.0, 1.0)}, [0, 1, 0, 2]),
    ],
)
def test_mask_of_each_setting(changes: dict, mask: list[int]) -> None:
    assert explore(row_sample(), CAMS, SCALES, replace(BOTH, **changes)).mask.tolist() == [mask]


def test_reactivation_changes_the_target_and_a_scale_that_is_off_is_still_shown() -> None:
    weak = replace(BOTH, class_number=1, weights=(1.0, 0.5), bg_score=0.9)
    on, off = (explore(row_sample(), CAMS, SCALES, replace(weak, reactivate=choice)) for choice in (True, False))
    assert near(off.target, [0, 0, 0.8, 1]) and near(on.target, [0, 0, 0.8 / 0.9, 1])
    alone = explore(row_sample(), CAMS, SCALES, replace(BOTH, weights=(0.0, 1.0)))
    assert near(alone.fused, [0, 1, 0, 0]) and near(alone.scale_maps[0], [1, 0.5, 0, 0])
    with pytest.raises(ValueError, match="no scale takes part"):
        explore(row_sample(), CAMS, SCALES, replace(BOTH, weights=(0.0, 0.0)))


def test_void_pixels_count_nowhere_and_without_ground_truth_there_is_no_iou() -> None:
    result = explore(row_sample([1, 255, 2, 2]), CAMS, SCALES, BOTH)
    assert result.iou is not None and result.miou == 1
    assert torch.isnan(result.iou[0])  # neither in the ground truth nor in the mask
    unknown = explore(row_sample(), CAMS, SCALES, BOTH)
    assert unknown.iou is None and np.isnan(unknown.miou) and unknown.iou_curve() is None


def test_curve_by_hand() -> None:
    # Scores: class 0 at 1 and 1 (right), class 1 at .5 (right) and 1 (wrong, background).
    result = explore(row_sample([1, 1, 2, 0]), CAMS, SCALES, BOTH)
    curve = result.iou_curve()
    assert curve is not None and curve.shape == (len(CURVE_SCORES), 3)
    low, high = CURVE_SCORES.index(0.48), CURVE_SCORES.index(0.52)
    assert curve[low].tolist() == pytest.approx([0, 1, 1 / 2])
    assert curve[high].tolist() == pytest.approx([0, 1, 0])  # the hit has become background, the false alarm is left


def test_crf_is_the_one_of_the_pseudo_masks(pretrained: Gallery) -> None:
    gallery = pretrained
    crf = CrfConfig(iterations=2, bilateral_sxy=10)
    settings = gallery.first_settings(0)
    plain, refined = (gallery.explore(0, "teacher", replace(settings, crf=choice)) for choice in (None, crf))
    expected = pseudo_mask(gallery.samples[0].image, plain.denoised, settings.bg_score, PseudoMaskConfig(crf=crf))
    assert torch.equal(refined.mask, expected) and not torch.equal(refined.mask, plain.mask)


# --- the gallery


def test_pretrained_gallery_is_the_same_every_time_and_unseen(pretrained: Gallery) -> None:
    one, other = pretrained, Gallery.pretrained(2)
    assert all(torch.equal(a.image, b.image) for a, b in zip(one.samples, other.samples, strict=False))
    assert one.roles == ("teacher", "student") and one.samples[0].mask is not None
    assert not torch.equal(Gallery.pretrained(1, seed=1).samples[0].image, one.samples[0].image)
    network, image = one.networks["teacher"], one.samples[0].image
    for flip in (True, False):
        expected = multi_scale_cams(network, image, one.scales, flip)
        torch.testing.assert_close(one.cams(0, "teacher", flip), expected)  # the network's memory layout may differ
    assert one.cams(0, "teacher", True)[0] is one.cams(0, "teacher", True)[0]  # kept


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run on four drawn images, without attention maps."""
    config = pretrained_config()
    data = config.data.model_copy(update={"num_train": 4, "num_val": 1, "image_size": 64})
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(config.model_copy(update={"data": data})))
    run = open_run(tmp_path / "runs" / "small", file)
    make_data(run.config, run.folder)
    return run


def add_teacher(run: Run) -> None:
    run.path("checkpoints").mkdir()
    run.checkpoint("teacher").write_bytes((ASSETS / "mini_teacher.safetensors").read_bytes())


def test_run_without_maps_and_networks_is_refused_with_the_command(run: Run) -> None:
    with pytest.raises(RunError, match=r"no attention maps yet(.|\n)*--until multi_scale_attention"):
        Gallery.of_run(run)
    with pytest.raises(RunError, match="there is no run 'nowhere'"):
        Gallery.of_run("nowhere")


def test_run_is_explored_with_its_stored_maps_first(run: Run) -> None:
    stored = AttentionMaps(run.path("cams", "teacher"), run.config.attention.scales)
    for number, image_id in enumerate(run.samples("train").image_ids):
        stored.write(image_id, [torch.full((6, 2, 2), float(number + 1))] * 4, (64, 64))
    gallery = Gallery.of_run(run.folder, 3)
    assert len(gallery.samples) == 3 and gallery.roles == ("teacher",)
    assert all(sample.mask is not None for sample in gallery.samples)
    assert float(gallery.cams(1, "teacher", True)[3].max()) == 2
    assert gallery.flips("teacher") == (True,)  # as in the run; there is no network for other views
    with pytest.raises(DataError, match="the teacher network is missing"):
        gallery.cams(1, "teacher", False)
    with pytest.raises(DataError, match="this run has kept none"):
        gallery.add_photo("a.png", png(np.zeros((32, 32, 3))))

    add_teacher(run)
    gallery = Gallery.of_run(run, 2)
    assert gallery.flips("teacher") == (True, False)
    assert float(gallery.cams(1, "teacher", True)[3].max()) == 2
    network = load_attention_network(ASSETS / "mini_teacher.safetensors", gallery.config.model, 6)
    expected = multi_scale_cams(network, gallery.samples[1].image, gallery.scales, flip=False)
    assert all(map(torch.equal, gallery.cams(1, "teacher", False), expected))

    # A photo of the same name is another picture with other maps.
    photo = gallery.add_photo(f"{gallery.samples[1].image_id}.png", png(np.zeros((40, 64, 3))))
    expected = multi_scale_cams(network, gallery.samples[photo].image, gallery.scales)
    assert all(map(torch.equal, gallery.cams(photo, "teacher", True), expected))


def test_background_threshold_is_the_one_that_the_run_has_resolved(run: Run) -> None:
    settings = run.path("config.yaml")
    settings.write_text(settings.read_text().replace("bg_score: 0.35", "bg_score: auto", 1))
    add_teacher(run)
    assert Gallery.of_run(run.folder, 1).first_settings(0).bg_score == 0.2  # stage 03 has not run yet
    run.path("bg_scores").mkdir()
    run.path("bg_scores", "teacher.json").write_text('{"bg_score": 0.45}')
    assert Gallery.of_run(run.folder, 1).first_settings(0).bg_score == 0.45


# --- photos


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def test_a_photo_shows_its_five_likeliest_classes_and_is_labelled_with_those_above_a_tenth(
    photos: PhotoGallery,
) -> None:
    probabilities = photos.probabilities(0)
    assert photos.names(0) == tuple(name for name, _ in probabilities) and len(probabilities) == 5
    assert probabilities[0][0] == "Egyptian cat" and probabilities[0][1] > 0.8 > 0.1 > probabilities[1][1]
    assert photos.first_settings(0).image_label == (0,) and photos.first_settings(0).class_number == 0
    assert [tuple(cam.shape) for cam in photos.cams(0, "teacher", False)] == [(5, *cell) for cell in CELLS]
    assert photos.names(1)[0] == "espresso"  # each photo has its own classes


CELLS = ((7, 10), (10, 15), (15, 22), (19, 29))  # of the cat's 300 x 451 pixels at stride 16


def test_a_photo_of_nothing_that_the_network_knows_has_an_empty_label(photos: PhotoGallery) -> None:
    index = photos.add_photo("grey.png", png(np.full((260, 260, 3), 127)))
    photos._classes[index], photos._found[index] = [7, 8, 9, 10, 11], torch.full((1000,), 0.001)
    photos.samples[index] = replace(photos.samples[index], image_label=torch.zeros(5))
    result = photos.explore(index, "teacher", photos.first_settings(index))
    assert photos.first_settings(index).image_label == () and not result.fused.any() and not result.mask.any()


def test_a_class_is_found_by_name_or_by_a_part_of_it(photos: PhotoGallery) -> None:
    before = photos.cams(0, "teacher", False)
    for text, name in {
        "LYNX": "lynx",
        "tabby cat": "tabby",
        "catamaran": "catamaran",
        "gyptian": "Egyptian cat",
    }.items():
        number = photos.add_class(0, text)
        assert photos.names(0)[number] == name and number in photos.first_settings(0).image_label
    assert photos.names(0)[5:] == ("catamaran",)  # the others were among the likeliest
    after = photos.cams(0, "teacher", False)
    assert all(torch.equal(old, new[:5]) and len(new) == 6 for old, new in zip(before, after, strict=True))
    # Of all names with "cat", Egyptian cat is the likeliest here.
    assert photos.add_class(0, "cat") == 0
    with pytest.raises(ValueError, match="none of the 1000 classes has a name with 'person of'"):
        photos.add_class(0, "person of")


def test_the_crf_changes_a_photos_mask(photos: PhotoGallery) -> None:
    """With the kernels of the drawn set, 128 pixels wide, it changed no pixel of a photo."""
    settings, crf = photos.first_settings(0), photos.config.pseudo_masks.crf
    plain, refined = (photos.explore(0, "teacher", replace(settings, crf=choice)).mask for choice in (None, crf))
    assert 0.01 < float((plain != refined).float().mean()) < 0.5


def test_photos_of_a_folder_are_its_pictures_in_order_at_working_size(tmp_path: Path) -> None:
    Image.new("RGB", (4032, 3024), "red").save(tmp_path / "b.JPG")
    Image.new("L", (400, 600)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no photo")
    gallery = Gallery.photos(str(tmp_path))
    assert [sample.image_id for sample in gallery.samples] == ["a", "b"]
    assert [tuple(sample.image.shape) for sample in gallery.samples] == [(3, 512, 341), (3, 384, 512)]
    assert [sample.image_id for sample in Gallery.photos([tmp_path / "b.JPG"]).samples] == ["b"]
    assert len(Gallery.photos(tmp_path / "a.png").samples) == 1
    for wrong, what in {"nowhere": "there is no folder", "notes.txt": "cannot be read as an image"}.items():
        with pytest.raises(DataError, match=what):
            Gallery.photos(tmp_path / wrong)


@pytest.mark.parametrize("size", [(8, 40), (1, 1), (1200, 30)])
def test_a_tiny_or_thin_photo_is_explored(photos: PhotoGallery, size: tuple[int, int]) -> None:
    index = photos.add_photo("thin.png", png(np.full((*size, 3), 127)))
    assert photos.explore(index, "teacher", photos.first_settings(index)).mask.shape == size
