"""Checks the answers to the notebooks' exercises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

TOLERANCE = 5e-3  # absolute or relative: people round


def check(answer: Any, right: Callable[[], Any], look_at: str) -> None:
    """Print whether an answer is right; a wrong one gets a hint and never the solution.

    Args:
        answer: a number, a sequence, array, tensor or table of numbers, or a set of names; None: not answered yet.
        right: computes the right answer, only if there is one to compare; None where this run has no ground truth.
        look_at: hint for a wrong answer, a sentence.
    """
    if answer is None:
        print("No answer yet. Put yours in place of None in the cell above, run it, then this one.")
    elif (expected := right()) is None:
        print("This run has nothing to compare with (no ground truth, or no ablation): unfold the solution.")
    else:
        trouble = _difference(answer, expected)
        print(f"Not yet: {trouble}. {look_at}" if trouble else "Right.")


def _difference(answer: Any, expected: Any) -> str:
    try:
        if isinstance(expected, set):
            extra, missing = set(answer) - expected, expected - set(answer)
            return f"{len(extra)} too many and {len(missing)} missing in the set" if extra or missing else ""
        np.testing.assert_allclose(_numbers(answer), _numbers(expected), rtol=TOLERANCE, atol=TOLERANCE)
    except AssertionError as error:  # its last lines hold the right numbers
        return next(line for line in str(error).splitlines() if "ismatch" in line)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, (list, tuple)):
        return np.asarray([_numbers(each) for each in values])
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=float)
