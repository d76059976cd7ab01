"""What a variant of the benchmark of students says, and what its words make of the targets."""

from __future__ import annotations

from benchmarks.student_targets import Trial, parse


def test_text_of_a_variant() -> None:
    words = "second round, short: of=student self_training.iterations=120"
    settings = ["self_training.iterations=120"]
    expected = Trial("second round, short", "tried_second_round_short", settings, teacher="student")
    assert parse(words) == expected and expected.trains
    assert expected.words == ["of=student"]
    assert parse("single: control") == Trial("single", "tried_single", [], control=True)


def test_a_network_of_the_run_is_not_trained() -> None:
    trial = parse("student, no saliency: pseudo_masks.saliency_weight=0")
    assert (trial.network, trial.trains) == ("student", False)
    assert trial.settings == ["pseudo_masks.saliency_weight=0"]
