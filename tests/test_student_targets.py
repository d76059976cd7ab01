"""What a variant of the benchmark of students says, and its hard targets."""

from __future__ import annotations

import torch

from benchmarks.student_targets import Trial, parse, strongest_alone


def test_text_of_a_variant() -> None:
    words = "second round, hard: hard of=student self_training.iterations=120"
    settings = ["self_training.iterations=120"]
    expected = Trial("second round, hard", "tried_second_round_hard", settings, hard=True, teacher="student")
    assert parse(words) == expected and expected.trains
    assert parse("single: control") == Trial("single", "tried_single", [], control=True)


def test_a_network_of_the_run_is_not_trained() -> None:
    trial = parse("student, no saliency: pseudo_masks.saliency_weight=0")
    assert (trial.network, trial.trains) == ("student", False)
    assert trial.settings == ["pseudo_masks.saliency_weight=0"]


def test_hard_target_is_the_strongest_class_alone() -> None:
    denoised = torch.tensor([[[0.75, 0.25]], [[0.5, 0.125]]])[None]  # two classes, one row of two pixels
    target = strongest_alone(denoised, bg_score=0.375)
    assert target.tolist() == [[[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.0]]]]
