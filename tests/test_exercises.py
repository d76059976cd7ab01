"""What a check cell says to right, rounded, misshapen and wrong answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from smaflib.report.exercises import check, verdict


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (0.612, 0.6137),  # rounded
        (torch.tensor(3), 3),
        ([1, 2], torch.tensor([1.0, 2.0])),
        ([torch.tensor(1.0), 2], [1.0, torch.tensor(2.0, requires_grad=True)]),
        (pd.Series([0.5, np.nan]), np.array([0.5, np.nan])),
        (pd.DataFrame(np.eye(2)), torch.eye(2)),
        (["ram", "crane"], {"crane", "ram"}),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ("ram", "ram"),
    ],
)
def test_right(answer: Any, right: Any) -> None:
    assert verdict(answer, lambda: right, "Look.") == "Right."


@pytest.mark.parametrize(
    ("answer", "right", "why"),
    [
        (0.7, 0.6, "it is not 0.7"),
        ([1, 2, 4], [1, 2, 3], "1 of 3 numbers are off"),
        ([1, 2], [1, 2, 3], r"should be of shape \(3,\), and it is of shape \(2,\)"),
        (1, [1, 2], "of shape .2,., and it is one number"),
        ("many", 3, "made of numbers, and it is a str"),
        ({"ram", "cat"}, {"ram", "crane"}, "1 too many and 1 missing in the set"),
        (3, {"ram"}, "should be a set, and it is a int"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "'b' is off"),
        ([1], {"a": 1}, "keys 'a'"),
        ("ram", "crane", "not 'ram'"),
    ],
)
def test_not_yet_says_why_and_where_to_look_but_not_the_answer(answer: Any, right: Any, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(told := verdict(answer, lambda: right, "Look there."))
    assert told.startswith("Not yet: ") and told.endswith(" Look there.")


def test_nothing_is_computed_before_there_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    check(None, lambda: pytest.fail("computed"), "Look.")
    assert capsys.readouterr().out.startswith("No answer yet.")


def test_a_run_that_cannot_tell_says_so() -> None:
    assert verdict(1, lambda: None, "Look.").startswith("This run has nothing to compare with")
