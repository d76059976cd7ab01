"""What a variant of the benchmark of students says, and what its words make of the targets."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import make_samples
from torch import Tensor

from benchmarks.student_targets import Agreement, SomeScales, Trial, agreement, drawn_scales, parse
from smaflib.cams import fuse_cams
from smaflib.maps import AttentionMaps, DenoisedMaps


def test_text_of_a_variant() -> None:
    words = "second round, short: of=student self_training.iterations=120"
    settings = ["self_training.iterations=120"]
    expected = Trial("second round, short", "tried_second_round_short", settings, teacher="student")
    assert parse(words) == expected and expected.trains
    assert expected.words == ["of=student"]
    assert parse("single: control") == Trial("single", "tried_single", [], control=True)
    fine = parse("fine: drop agree stride=2 seed=1")
    assert fine == Trial("fine", "tried_fine", ["seed=1"], drop=True, agree=True, stride=2)
    assert fine.words == ["drop", "agree", "stride=2"]


def test_a_network_of_the_run_is_not_trained() -> None:
    trial = parse("student, no saliency: pseudo_masks.saliency_weight=0")
    assert (trial.network, trial.trains) == ("student", False)
    assert trial.settings == ["pseudo_masks.saliency_weight=0"]


def test_agreement_by_hand() -> None:
    # Two views, two classes, four pixels: they agree, differ by 1 in one class, by 1/2 in the other, by both.
    views = torch.tensor([[[0.5, 0, 1, 0], [0, 1, 1, 1]], [[0.5, 1, 1, 1], [0, 1, 0.5, 0.5]]])[:, :, None]
    assert agreement(views).tolist() == [[1.0, 0.0, 0.5, 0.0]]
    assert agreement(views[:, 1:]).tolist() == [[1.0, 1.0, 0.5, 0.5]]


def test_agreement_takes_the_mirrored_view_out_of_the_mean(tmp_path: Path) -> None:
    samples = make_samples(1, size=(1, 2))  # its label is class 0
    means, plain = AttentionMaps(tmp_path / "means", (1.0,)), AttentionMaps(tmp_path / "plain", (1.0,))
    others = [[1.0, 0.0]], [[0.0, 4.0]]  # absent classes have no say
    # The view is (0, 2) and its mirror image (1, 2): with peaks at 1, (0, 1) and (1/2, 1).
    means.write("image0", [torch.tensor([[[0.5, 2.0]], *others])], (1, 2))
    plain.write("image0", [torch.tensor([[[0.0, 2.0]], *others])], (1, 2))
    found = Agreement(means, plain, samples)
    assert len(found) == 1
    assert torch.allclose(found[0], torch.tensor([[0.5, 1.0]]), atol=1e-4)


def test_scales_are_drawn_anew_and_never_none(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(drawn_scales([0.5, 1.0], generator)) for _ in range(64)}
    assert drawn == {(0.5,), (1.0,), (0.5, 1.0)}

    samples, maps = make_samples(1, size=(1, 2)), AttentionMaps(tmp_path, (0.5, 1.0))
    cams = [torch.tensor([[[1.0, 2.0]]]).repeat(3, 1, 1), torch.tensor([[[2.0, 0.0]]]).repeat(3, 1, 1)]
    maps.write("image0", cams, (1, 2))

    def read(seed: int) -> list[Tensor]:
        some = SomeScales(DenoisedMaps(maps, samples), seed)
        return [some[0][:1] for _ in range(32)]

    possible = [fuse_cams([cam[:1] for cam in some], (1, 2)) for some in (cams[:1], cams[1:], cams)]
    found = [next(place for place, fused in enumerate(possible) if torch.equal(one, fused)) for one in read(seed=0)]
    assert set(found) == {0, 1, 2}
    assert all(torch.equal(one, two) for one, two in zip(read(seed=0), read(seed=0), strict=True))
