"""Stage 5: labels from maps, refined, written once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import generator, make_samples
from torch import Tensor

from smaflib import pseudo_masks as module
from smaflib.config import CrfConfig, ParConfig, PseudoMaskConfig
from smaflib.data.masks import read_mask
from smaflib.pseudo_masks import pseudo_mask, without_specks, write_pseudo_masks
from smaflib.refinement import dense_crf, pixel_adaptive_refinement

CRF = CrfConfig(iterations=3, bilateral_sxy=10, bilateral_srgb=8, bilateral_compat=6)
SIZE = (16, 20)
UNREFINED = PseudoMaskConfig(refine="none")


class RandomMaps(Sequence[Tensor]):
    """(3, 16, 20) per image, made when asked for; notes what was asked for."""

    def __init__(self, num: int) -> None:
        self.num, self.asked = num, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        self.asked.append(index)
        return torch.rand(3, *SIZE, generator=generator(index))


def test_labels_by_hand() -> None:
    image = torch.zeros(3, 1, 4, dtype=torch.uint8)
    denoised = torch.tensor([[[0.9, 0.1, 0.3, 0.2]], [[0.0, 0.1, 0.4, 0.0]]])
    mask = pseudo_mask(image, denoised, 0.2, UNREFINED)
    # A class that just ties with the background loses to it.
    assert mask.dtype == torch.uint8 and mask.tolist() == [[1, 0, 2, 0]]


def test_crf_refines_the_hard_labels_over_all_classes() -> None:
    sample, denoised = make_samples(1, SIZE)[0], RandomMaps(1)[0]
    hard = pseudo_mask(sample.image, denoised, 0.5, UNREFINED)
    refined = pseudo_mask(sample.image, denoised, 0.5, PseudoMaskConfig(crf=CRF))
    assert torch.equal(refined, dense_crf(sample.image, hard, CRF, num_labels=4))
    assert not torch.equal(refined, hard)


def test_specks_take_the_label_around_them() -> None:
    mask = torch.zeros(10, 10, dtype=torch.uint8)
    mask[:6, :5] = 1
    mask[2, 2] = 0  # a hole
    mask[4:6, 2:4] = 2  # four pixels, of which two touch the border of class 1
    mask[8, 8] = mask[9, 9] = 1  # a diagonal does not connect
    for min_part, labels in ((0.0, mask), (0.01, mask), (1.0, mask)):  # of 1.0 all parts are smaller
        assert torch.equal(without_specks(mask, min_part), labels)
    clean = mask.clone()
    clean[2, 2], clean[8, 8], clean[9, 9] = 1, 0, 0
    assert torch.equal(without_specks(mask, 0.02), clean)
    larger = without_specks(mask, 0.05)
    assert larger[4, 2:4].tolist() == [1, 1] and not (larger == 2).any()
    maps, config = [RandomMaps(2)[index] for index in range(2)], UNREFINED.model_copy(update={"min_part": 0.02})
    samples = make_samples(2, SIZE)
    hard = [pseudo_mask(sample.image, each, 0.5, UNREFINED) for sample, each in zip(samples, maps, strict=True)]
    expected = [without_specks(each, 0.02) for each in hard]
    assert not torch.equal(hard[0], expected[0])
    assert all(map(torch.equal, module.pseudo_masks(samples, maps, 0.5, config), expected))
    assert torch.equal(pseudo_mask(samples[0].image, maps[0], 0.5, config), expected[0])


def test_existing_masks_are_kept_and_maps_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, maps, most_ahead = make_samples(6, SIZE), RandomMaps(6), 0
    write_pseudo_masks(samples[:2], RandomMaps(2), tmp_path, 0.5, UNREFINED)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    original = module.save_mask

    def spy(path: Path, mask: Tensor) -> None:
        nonlocal most_ahead
        original(path, mask)
        most_ahead = max(most_ahead, len(maps.asked) - (len(list(tmp_path.iterdir())) - 2))

    monkeypatch.setattr(module, "save_mask", spy)
    write_pseudo_masks(samples, maps, tmp_path, 0.5, UNREFINED)
    assert maps.asked == [2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"image{index}.png" for index in range(6)]
    expected = pseudo_mask(samples[3].image, maps[3], 0.5, UNREFINED)
    assert torch.equal(read_mask(tmp_path / "image3.png"), expected)
    assert most_ahead <= 1  # the maps of a data set do not fit into memory
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_scores_and_pixel_adaptive_refinement_start_from_the_maps() -> None:
    sample, denoised = make_samples(1, SIZE)[0], RandomMaps(1)[0]
    scores = torch.cat([torch.full((1, *SIZE), 0.5), denoised])
    soft = CRF.model_copy(update={"unary": "scores", "sharpness": 3.0})
    assert torch.equal(
        pseudo_mask(sample.image, denoised, 0.5, PseudoMaskConfig(crf=soft)), dense_crf(sample.image, scores, soft)
    )
    par = ParConfig(iterations=2, dilations=(1, 3))
    smoothed = pixel_adaptive_refinement(sample.image, scores, par)
    assert torch.equal(
        pseudo_mask(sample.image, denoised, 0.5, PseudoMaskConfig(refine="par", par=par)),
        smoothed.argmax(dim=0).to(torch.uint8),
    )
