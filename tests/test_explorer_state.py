"""What the explorer shows, by numbers that can be worked out by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PixelNetwork, make_samples, tiny_config
from PIL import Image
from torch import Tensor

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import CrfConfig, PseudoMaskConfig, dump_config
from smaflib.data import Sample
from smaflib.errors import DataError, RunError
from smaflib.explorer.state import (
    COLOR_MAPS,
    CURVE_SCORES,
    PHOTO_SIDE,
    Gallery,
    Settings,
    color_table,
    explore,
    iou_curve,
    picture_address,
    predict_label,
    read_photo,
    to_bytes,
)
from smaflib.maps import AttentionMaps
from smaflib.models.networks import load_attention_network
from smaflib.models.pretrained import ASSETS, pretrained_config, pretrained_network
from smaflib.pseudo_masks import pseudo_mask
from smaflib.runs import open_run

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


def test_weights_tell_how_much_a_scale_counts() -> None:
    # Class 0: .8 * 1 and .4 * 1 + .4 * .5 = .6, so .75 of the peak. Class 1: .2 and .1 + .15 = .25.
    result = explore(row_sample(), CAMS, SCALES, replace(BOTH, weights=(1.0, 0.5)))
    assert near(result.fused, [1, 0.75, 0, 0]) and near(result.denoised[1], [0, 0, 0.8, 1])
    alone = explore(row_sample(), CAMS, SCALES, replace(BOTH, weights=(0.0, 1.0)))
    assert near(alone.fused, [0, 1, 0, 0]) and near(alone.denoised[1], [0, 0, 0, 1])
    assert near(alone.scale_maps[0], [1, 0.5, 0, 0])  # a scale that takes no part can still be shown
    with pytest.raises(ValueError, match="no scale takes part"):
        explore(row_sample(), CAMS, SCALES, replace(BOTH, weights=(0.0, 0.0)))


def test_denoising_erases_what_the_image_label_does_not_name() -> None:
    only = replace(BOTH, image_label=(0,))
    assert explore(row_sample(), CAMS, SCALES, only).mask.tolist() == [[1, 1, 0, 0]]
    assert explore(row_sample(), CAMS, SCALES, replace(only, denoise=False)).mask.tolist() == [[1, 1, 2, 2]]
    shown = explore(row_sample(), CAMS, SCALES, replace(only, class_number=1))
    assert near(shown.fused, [0, 0, 0, 0]) and shown.mask.tolist() == [[1, 1, 0, 0]]
    assert explore(row_sample(), CAMS, SCALES, replace(BOTH, image_label=())).mask.tolist() == [[0, 0, 0, 0]]


def test_reactivation_changes_the_target_and_never_the_mask() -> None:
    weak = replace(BOTH, class_number=1, weights=(1.0, 0.5), bg_score=0.9)
    on, off = (explore(row_sample(), CAMS, SCALES, replace(weak, reactivate=choice)) for choice in (True, False))
    assert near(off.target, [0, 0, 0.8, 1]) and near(on.target, [0, 0, 0.8 / 0.9, 1])
    assert torch.equal(on.mask, off.mask) and on.mask.tolist() == [[1, 0, 0, 2]]


def test_void_pixels_count_nowhere_and_without_ground_truth_there_is_no_iou() -> None:
    result = explore(row_sample([1, 255, 2, 2]), CAMS, SCALES, BOTH)
    assert result.iou is not None and result.miou == 1
    assert torch.isnan(result.iou[0])  # neither in the ground truth nor in the mask
    unknown = explore(row_sample(), CAMS, SCALES, BOTH)
    assert unknown.iou is None and np.isnan(unknown.miou) and iou_curve(unknown) is None


def test_curve_by_hand() -> None:
    # Scores: class 0 at 1 and 1 (right), class 1 at .5 (right) and 1 (wrong, background).
    result = explore(row_sample([1, 1, 2, 0]), CAMS, SCALES, replace(BOTH, class_number=1))
    curve = iou_curve(result)
    assert curve is not None and curve.scores == CURVE_SCORES
    low, high = curve.scores.index(0.48), curve.scores.index(0.52)
    assert curve.shown[low] == pytest.approx(1 / 2)
    assert curve.shown[high] == 0  # the hit has become background, the false alarm is left
    assert curve.mean[low] == pytest.approx((0 + 1 + 1 / 2) / 3)
    assert curve.mean[high] == pytest.approx(1 / 3)
    assert iou_curve(replace(result, settings=replace(BOTH, class_number=1, bg_score=0.9))) == curve


def test_pixel_tells_each_scale_and_its_label() -> None:
    result = explore(row_sample([1, 1, 2, 0]), CAMS, SCALES, replace(BOTH, weights=(1.0, 0.5)))
    reading = result.read(0, 1)
    expected = {"scale 1": 0.5, "scale 2": 1.0, "fused": 0.75, "target": 1.0}
    assert reading.values == pytest.approx(expected, abs=1e-4)
    assert (reading.label, reading.ground_truth) == (1, 1) and result.read(0, 3).ground_truth == 0
    assert explore(row_sample(), CAMS, SCALES, BOTH).read(0, 0).ground_truth is None
    for row, col in ((1, 0), (0, 4), (-1, 0)):
        with pytest.raises(IndexError, match="1 x 4 pixels"):
            result.read(row, col)


def test_crf_is_the_one_of_the_pseudo_masks() -> None:
    gallery = Gallery.pretrained(1)
    crf = CrfConfig(iterations=2, bilateral_sxy=10)
    settings = gallery.first_settings(0)
    plain, refined = (gallery.explore(0, "teacher", replace(settings, crf=choice)) for choice in (None, crf))
    expected = pseudo_mask(gallery.samples[0].image, plain.denoised, settings.bg_score, PseudoMaskConfig(crf=crf))
    assert torch.equal(refined.mask, expected) and not torch.equal(refined.mask, plain.mask)
    assert torch.equal(refined.labels, plain.mask) and plain.iou is not None and refined.iou_before_crf is not None
    assert refined.iou_before_crf.nan_to_num(-1).tolist() == plain.iou.nan_to_num(-1).tolist()
    assert iou_curve(refined) == iou_curve(plain)  # of the masks before the CRF


# --- the gallery


def test_pretrained_gallery_is_the_same_every_time_and_unseen() -> None:
    one, other = Gallery.pretrained(2), Gallery.pretrained(2)
    assert [s.image_id for s in one.samples] == [s.image_id for s in other.samples] and len(one.samples) == 2
    assert all(torch.equal(a.image, b.image) for a, b in zip(one.samples, other.samples, strict=True))
    assert one.roles == ("teacher", "student") and one.samples[0].mask is not None
    assert not torch.equal(Gallery.pretrained(1, seed=1).samples[0].image, one.samples[0].image)


def test_what_the_notebook_tells_to_try_is_so() -> None:
    gallery, index = Gallery.pretrained(8), 2
    names, first = gallery.class_names, gallery.first_settings(2)
    llama, crane = names.index("llama"), names.index("crane")
    assert first.image_label == (llama, crane) and gallery.scales == (0.5, 1.0, 1.5, 2.0)

    def iou(number: int, role: str = "teacher", image: int = index, **changes: object) -> float:
        settings = replace(gallery.first_settings(image), **changes)  # type: ignore[arg-type]
        found = gallery.explore(image, role, settings).iou  # type: ignore[arg-type]
        assert found is not None
        return float(found[number + 1])

    small, large = (0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0)
    assert iou(crane, weights=small) > iou(crane, weights=large) + 0.3
    assert iou(llama, weights=large) > iou(llama, weights=small) + 0.1

    def mean(**changes: object) -> float:
        return gallery.explore(index, "teacher", replace(first, **changes)).miou  # type: ignore[arg-type]

    assert mean(denoise=False) < mean() - 0.2
    assert mean(image_label=(*first.image_label, names.index("ram"))) < mean() - 0.02
    by_role = [
        [iou(k, role, image) for image, k in ((1, names.index("plant")), (2, crane))] for role in ("teacher", "student")
    ]
    assert by_role[1][0] > by_role[0][0] and by_role[1][1] < by_role[0][1]  # better on some, worse on others
    curves = [iou_curve(gallery.explore(index, "teacher", replace(first, class_number=k))) for k in (llama, crane)]
    best = [curve.scores[int(np.nanargmax(curve.shown))] for curve in curves if curve]
    assert best[0] < best[1]
    crf = gallery.config.pseudo_masks.crf
    gains = [iou(llama, image=image, crf=crf) - iou(llama, image=image) for image in (4, 2)]
    assert gains[0] > 0.2 and gains[1] < 0.1


def test_flip_is_the_mean_with_the_mirror_image() -> None:
    gallery = Gallery.pretrained(1)
    network, image = gallery.networks["teacher"], gallery.samples[0].image
    for flip in (True, False):
        expected = multi_scale_cams(network, image, gallery.scales, flip)
        assert all(map(torch.equal, gallery.cams(0, "teacher", flip), expected))
    assert gallery.cams(0, "teacher", True)[0] is gallery.cams(0, "teacher", True)[0]  # kept
    assert gallery.flips(0, "teacher") == (True, False)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of a classifier on four mini images, without attention maps."""
    config = pretrained_config()
    data = config.data.model_copy(update={"num_train": 4, "num_val": 1, "image_size": 64})
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(config.model_copy(update={"data": data})))
    run = open_run(tmp_path / "runs" / "small", file)
    from smaflib.data import make_data

    make_data(run.config, run.folder)
    return run.folder


def test_run_without_maps_and_networks_is_refused_with_the_command(run_folder: Path) -> None:
    with pytest.raises(RunError, match=r"no attention maps yet(.|\n)*--until multi_scale_attention"):
        Gallery.of_run(run_folder)
    with pytest.raises(RunError, match="there is no run 'nowhere'"):
        Gallery.of_run("nowhere")


def test_run_is_explored_with_its_stored_maps_first(run_folder: Path) -> None:
    run_samples = Gallery.pretrained(1)
    stored = AttentionMaps(run_folder / "cams" / "teacher", run_samples.scales)
    from smaflib.runs import read_run

    split = read_run(run_folder).samples("train")
    for number, image_id in enumerate(split.image_ids):
        stored.write(image_id, [torch.full((6, 2, 2), float(number + 1))] * 4, (64, 64))
    gallery = Gallery.of_run(run_folder, 3)
    assert len(gallery.samples) == 3 and gallery.roles == ("teacher",)
    assert all(sample.mask is not None for sample in gallery.samples)
    assert float(gallery.cams(1, "teacher", True)[3].max()) == 2
    assert gallery.flips(1, "teacher") == (True,)  # as in the run; there is no network for other views
    with pytest.raises(DataError, match="neither its maps nor its network"):
        gallery.cams(1, "teacher", False)
    with pytest.raises(DataError, match="this run has kept none"):
        gallery.add_photo("a.png", png(np.zeros((32, 32, 3))))

    (run_folder / "checkpoints").mkdir()
    (run_folder / "checkpoints/teacher.safetensors").write_bytes((ASSETS / "mini_teacher.safetensors").read_bytes())
    gallery = Gallery.of_run(run_folder, 2)
    assert gallery.flips(1, "teacher") == (True, False)
    assert float(gallery.cams(1, "teacher", True)[3].max()) == 2
    network = load_attention_network(ASSETS / "mini_teacher.safetensors", gallery.config.model, 6)
    expected = multi_scale_cams(network, gallery.samples[1].image, gallery.scales, flip=False)
    assert all(map(torch.equal, gallery.cams(1, "teacher", False), expected))

    # A photo of the same name is another picture, and so are its maps.
    photo = gallery.add_photo(f"{gallery.samples[1].image_id}.png", png(np.zeros((40, 64, 3))))
    expected = multi_scale_cams(network, gallery.samples[photo].image, gallery.scales)
    assert all(map(torch.equal, gallery.cams(photo, "teacher", True), expected))


def test_background_score_is_the_one_that_the_run_has_resolved(run_folder: Path) -> None:
    settings = run_folder / "config.yaml"
    settings.write_text(settings.read_text().replace("bg_score: 0.35", "bg_score: auto", 1))
    (run_folder / "checkpoints").mkdir()
    (run_folder / "checkpoints/teacher.safetensors").write_bytes((ASSETS / "mini_teacher.safetensors").read_bytes())
    assert Gallery.of_run(run_folder, 1).first_settings(0).bg_score == 0.2  # stage 03 has not run yet
    (run_folder / "bg_scores").mkdir()
    (run_folder / "bg_scores/teacher.json").write_text('{"bg_score": 0.45}')
    assert Gallery.of_run(run_folder, 1).first_settings(0).bg_score == 0.45


def test_background_score_that_is_chosen_from_maps_begins_with_the_papers() -> None:
    gallery = Gallery.pretrained(1)
    attention = gallery.config.attention.model_copy(update={"bg_score": "auto"})
    gallery.config = gallery.config.model_copy(update={"attention": attention})
    assert gallery.first_settings(0).bg_score == 0.2


# --- photos


def png(pixels: np.ndarray, **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG", **options)
    return content.getvalue()


def test_photo_gets_the_label_that_the_network_predicts_and_no_ground_truth() -> None:
    gallery = Gallery.pretrained(1)
    own = gallery.samples[0].image
    index = gallery.add_photo("holiday.png", png(own.permute(1, 2, 0).numpy()))
    photo = gallery.samples[index]
    assert index == 1 and photo.image_id == "holiday" and photo.mask is None
    assert torch.equal(photo.image, own)
    assert torch.equal(photo.image_label, predict_label(gallery.networks["teacher"], own, gallery.config))
    assert gallery.explore(index, "student", gallery.first_settings(index)).iou is None


def test_label_is_every_class_above_0_or_the_likeliest() -> None:
    # Logits are red - green and green - red, both taken at the mean of the image.
    network = PixelNetwork(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]))
    network.image_logits = lambda logits: logits.mean(dim=(2, 3))  # type: ignore[assignment]
    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 200
    assert predict_label(network, red, tiny_config()).tolist() == [1, 0]  # type: ignore[arg-type]
    both = PixelNetwork(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]))
    both.image_logits = lambda logits: logits.mean(dim=(2, 3))  # type: ignore[assignment]
    assert predict_label(both, red, tiny_config()).tolist() == [1, 1]  # type: ignore[arg-type]
    none = PixelNetwork(torch.tensor([[-1.0, 0.0, 0.0], [-0.5, 0.0, 0.0]]))
    none.image_logits = lambda logits: logits.mean(dim=(2, 3))  # type: ignore[assignment]
    assert predict_label(none, red, tiny_config()).tolist() == [0, 1]  # type: ignore[arg-type]


def test_photo_is_turned_upright_and_shrunk() -> None:
    picture = Image.new("RGB", (2 * PHOTO_SIDE, PHOTO_SIDE), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    content = io.BytesIO()
    picture.save(content, "JPEG", exif=exif)
    assert read_photo("a.jpg", content.getvalue()).shape == (3, PHOTO_SIDE, PHOTO_SIDE // 2)
    grey = io.BytesIO()
    Image.new("L", (40, 30), 7).save(grey, "PNG")
    assert read_photo("b.png", grey.getvalue()).unique().tolist() == [7]


@pytest.mark.parametrize("content", [b"", b"dear sir", png(np.zeros((40, 40, 3)))[:60]])
def test_file_that_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="letter.jpg cannot be read as a picture"):
        read_photo("letter.jpg", content)
    with pytest.raises(DataError, match="only 8 x 40 pixels"):
        read_photo("thin.png", png(np.zeros((40, 8, 3))))


# --- appearance


def test_color_maps_rise_in_lightness() -> None:
    for name in COLOR_MAPS:
        colors = np.frombuffer(color_table(name), np.uint8).reshape(256, 3) / 255
        linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert luminance[-1] - luminance[0] > 0.5
        assert (np.diff(luminance) > -0.002).all(), name  # rounding to 8 bits


def test_bytes_of_maps_and_masks() -> None:
    assert list(to_bytes(torch.tensor([[0.0, 0.5, 1.0, 1.2]]))) == [0, 128, 255, 255]
    assert list(to_bytes(torch.tensor([[0, 3, 255]], dtype=torch.uint8))) == [0, 3, 255]
    image = make_samples(1)[0].image
    assert picture_address(image).startswith("data:image/jpeg;base64,")


def test_fusion_of_pretrained_maps_is_fuse_cams() -> None:
    gallery = Gallery.pretrained(1)
    settings = replace(gallery.first_settings(0), denoise=False)
    for rule in ("sum", "mean", "max", "size_adaptive"):
        result = gallery.explore(0, "student", replace(settings, fusion=rule))
        cams = multi_scale_cams(pretrained_network("student"), gallery.samples[0].image, gallery.scales)
        assert torch.equal(result.denoised, fuse_cams(cams, (128, 128), rule, gallery.scales))
