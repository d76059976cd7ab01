"""Stage 5: labels from maps, refined, written once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers import generator, make_samples
from torch import Tensor

from smaflib import pseudo_masks as module
from smaflib.config import CrfConfig, ParConfig, PseudoMaskConfig
from smaflib.data.masks import read_mask
from smaflib.files import PARTIAL
from smaflib.pseudo_masks import pseudo_mask, pseudo_masks, write_pseudo_masks
from smaflib.refinement import dense_crf, pixel_adaptive_refinement

CRF = CrfConfig(iterations=3, bilateral_sxy=10, bilateral_srgb=8, bilateral_compat=6)
SIZE = (16, 20)
UNREFINED = PseudoMaskConfig(refine="none")


def with_crf(num_workers: int = 1) -> PseudoMaskConfig:
    return PseudoMaskConfig(crf=CRF, num_workers=num_workers)


class RandomMaps(Sequence[Tensor]):
    """(3, 16, 20) per image, made when asked for; notes what was asked for."""

    def __init__(self, num: int) -> None:
        self.num, self.asked, self.given = num, [], []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        self.asked.append(index)
        self.given.append(torch.rand(3, *SIZE, generator=generator(index)))
        return self.given[-1]


def test_labels_by_hand() -> None:
    image = torch.zeros(3, 1, 4, dtype=torch.uint8)
    denoised = torch.tensor([[[0.9, 0.1, 0.3, 0.2]], [[0.0, 0.1, 0.4, 0.0]]])
    mask = pseudo_mask(image, denoised, 0.2, UNREFINED)
    # A class that just ties with the background loses to it.
    assert mask.dtype == torch.uint8 and mask.tolist() == [[1, 0, 2, 0]]


def test_crf_refines_the_hard_labels_over_all_classes() -> None:
    sample, denoised = make_samples(1, SIZE)[0], RandomMaps(1)[0]
    hard = pseudo_mask(sample.image, denoised, 0.5, UNREFINED)
    refined = pseudo_mask(sample.image, denoised, 0.5, with_crf())
    assert torch.equal(refined, dense_crf(sample.image, hard, CRF, num_labels=4))
    assert not torch.equal(refined, hard)


def test_processes_give_what_one_process_gives_in_the_same_order() -> None:
    samples, maps = make_samples(9, SIZE), RandomMaps(9)
    serial = list(pseudo_masks(samples, maps, 0.5, with_crf(1)))
    parallel = list(pseudo_masks(samples, maps, 0.5, with_crf(2)))
    assert all(torch.equal(one, other) for one, other in zip(serial, parallel, strict=True))
    assert not torch.equal(serial[0], serial[1])
    # Shared memory is small in containers (64 MB) and maps are large.
    assert not any(given.is_shared() for given in maps.given)


def test_stopping_early_leaves_nothing_in_the_way_of_a_new_start() -> None:
    samples, maps = make_samples(40, SIZE), RandomMaps(40)
    first = next(pseudo_masks(samples, maps, 0.5, with_crf(2)))  # the rest is dropped
    assert len(maps.asked) <= 8  # four images per process are under way, not the data set
    again = list(pseudo_masks(samples, RandomMaps(40), 0.5, with_crf(2)))
    assert len(again) == 40 and torch.equal(again[0], first)


def test_masks_come_one_by_one() -> None:
    maps = RandomMaps(20)
    masks = pseudo_masks(make_samples(20, SIZE), maps, 0.5, UNREFINED)
    next(masks)
    next(masks)
    assert maps.asked == [0, 1]


def test_masks_are_written_as_palette_pngs(tmp_path: Path) -> None:
    samples, maps = make_samples(3, SIZE), RandomMaps(3)
    write_pseudo_masks(samples, maps, tmp_path / "masks", 0.5, with_crf(1))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["image0.png", "image1.png", "image2.png"]
    for index, sample in enumerate(samples):
        expected = pseudo_mask(sample.image, maps[index], 0.5, with_crf())
        assert torch.equal(read_mask(tmp_path / "masks" / f"{sample.image_id}.png"), expected)


def test_refine_none_leaves_the_crf_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("refined")

    monkeypatch.setattr(module, "refine_many", never)
    monkeypatch.setattr(module, "refine", never)
    write_pseudo_masks(make_samples(2, SIZE), RandomMaps(2), tmp_path, 0.5, UNREFINED)
    assert torch.equal(
        read_mask(tmp_path / "image1.png"), pseudo_mask(torch.empty(0), RandomMaps(2)[1], 0.5, UNREFINED)
    )


def test_killed_writing_resumes_with_what_is_missing_one_map_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, config = make_samples(6, SIZE), UNREFINED
    whole = tmp_path / "whole"
    write_pseudo_masks(samples, RandomMaps(6), whole, 0.5, config)

    resumed = tmp_path / "resumed"
    write_pseudo_masks(samples[:2], RandomMaps(2), resumed, 0.5, config)  # as far as the killed run came
    write_pseudo_masks(samples.subset([4]), [RandomMaps(6)[4]], resumed, 0.5, config)
    times = {path.name: path.stat().st_mtime_ns for path in resumed.iterdir()}
    assert len(times) == 3

    maps, most_ahead = RandomMaps(6), 0
    original = module.save_mask

    def spy(path: Path, mask: Tensor) -> None:
        nonlocal most_ahead
        original(path, mask)
        most_ahead = max(most_ahead, len(maps.asked) - (len(list(resumed.iterdir())) - 3))

    monkeypatch.setattr(module, "save_mask", spy)
    write_pseudo_masks(samples, maps, resumed, 0.5, config)
    assert maps.asked == [2, 3, 5]
    assert most_ahead <= 1  # the maps of a data set do not fit into memory
    for path in whole.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes()
    assert all((resumed / name).stat().st_mtime_ns == time for name, time in times.items())


def test_complete_folder_asks_for_nothing(tmp_path: Path) -> None:
    samples, config = make_samples(2, SIZE), UNREFINED
    write_pseudo_masks(samples, RandomMaps(2), tmp_path, 0.5, config)
    maps = RandomMaps(2)
    write_pseudo_masks(samples, maps, tmp_path, 0.5, config)
    assert maps.asked == []


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


@pytest.mark.parametrize("refine", ["crf", "par"])
def test_config_names_the_refinement(tmp_path: Path, refine: Literal["crf", "par"]) -> None:
    samples, maps = make_samples(2, SIZE), RandomMaps(2)
    config = PseudoMaskConfig(refine=refine, crf=CRF, par=ParConfig(dilations=(1, 2)), num_workers=1, backend="torch")
    write_pseudo_masks(samples, maps, tmp_path, 0.5, config)
    expected = pseudo_mask(samples[1].image, maps[1], 0.5, config)
    assert torch.equal(read_mask(tmp_path / "image1.png"), expected)
    assert not torch.equal(expected, pseudo_mask(samples[1].image, maps[1], 0.5, UNREFINED))


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_pseudo_masks import CRF, SIZE, RandomMaps
from helpers import make_samples
from smaflib.config import PseudoMaskConfig
from smaflib.pseudo_masks import write_pseudo_masks
class SlowMaps(RandomMaps):  # so that there is time to kill it
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)
config = PseudoMaskConfig(crf=CRF, num_workers=2)
write_pseudo_masks(make_samples(400, SIZE), SlowMaps(400), Path(sys.argv[1]), 0.5, config)
"""


def processes_with(variable: str) -> list[str]:
    """Where Linux lists them: processes that have an environment variable, told as NAME=VALUE."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder.name)
    return found


def whole_masks(folder: Path) -> list[Path]:
    """Masks without the file that is being written, which glob lists, too."""
    return [path for path in folder.glob("*.png") if not path.name.startswith(PARTIAL)]


def test_a_killed_process_and_its_successor_write_what_one_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(Path(__file__).parent)]
    mark = f"SMAF_TEST_MARK={tmp_path}"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "SMAF_TEST_MARK": str(tmp_path)})
    deadline = time.monotonic() + 60
    while len(whole_masks(tmp_path / "killed")) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while left := processes_with(mark):  # its workers go, too
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    written = {path: path.read_bytes() for path in whole_masks(tmp_path / "killed")}
    assert 20 <= len(written) < 400
    samples, maps, config = make_samples(400, SIZE), RandomMaps(400), with_crf(1)
    write_pseudo_masks(samples, maps, tmp_path / "killed", 0.5, config)
    write_pseudo_masks(samples, RandomMaps(400), tmp_path / "whole", 0.5, config)
    assert len(maps.asked) == 400 - len(written)  # nothing was made twice
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
    assert all(path.read_bytes() == content for path, content in written.items())
