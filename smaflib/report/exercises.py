"""The check cells of the notebooks' exercises: right, or what to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pandas as pd
import torch

TOLERANCE = 5e-3
"""An answer may differ by so much, absolutely or as a share of the right one: people round."""


def check(answer: Any, right: Callable[[], Any], look_at: str) -> None:
    """Print :func:`verdict`."""
    print(verdict(answer, right, look_at))


def verdict(answer: Any, right: Callable[[], Any], look_at: str) -> str:
    """Compare an answer with the right one, which is only computed when there is an answer.

    Args:
        answer: None: nobody has answered yet. A number, a text, or a sequence, set, table, array or mapping of them.
        right: gives the right answer; None from it: this run cannot tell, as without ground truth.
        look_at: what to look at where the answer is wrong, a sentence.

    Returns:
        A sentence that begins with "Right", "Not yet" or says that there is nothing to compare.
    """
    if answer is None:
        return "No answer yet. Put yours in place of None in the cell above, run it, then this one."
    expected = right()
    if expected is None:
        return "This run has nothing to compare with (no ground truth, or no ablation): unfold the solution."
    trouble = _difference(answer, expected)
    return f"Not yet: {trouble}. {look_at}" if trouble else "Right."


def _difference(answer: Any, expected: Any) -> str:
    """What is wrong with an answer; nothing if it is right. It does not say what is right."""
    if isinstance(expected, str):
        return "" if answer == expected else f"it is not {answer!r}"
    if isinstance(expected, Set):
        if not isinstance(answer, (Set, Sequence)) or isinstance(answer, str):
            return f"the answer should be a set, and it is a {type(answer).__name__}"
        unasked, missing = len(set(answer) - expected), len(expected - set(answer))
        found = [f"{unasked} too many"] * bool(unasked) + [f"{missing} missing"] * bool(missing)
        return " and ".join(found) and f"{' and '.join(found)} in the set"
    if isinstance(expected, Mapping):
        if not isinstance(answer, Mapping) or set(answer) != set(expected):
            return f"the answer should be a dictionary with the keys {', '.join(map(repr, expected))}"
        wrong = [key for key in expected if _difference(answer[key], expected[key])]
        return f"{', '.join(map(repr, wrong))} {'are' if len(wrong) > 1 else 'is'} off" if wrong else ""
    return _numbers_differ(answer, expected)


def _numbers_differ(answer: Any, expected: Any) -> str:
    try:
        mine, right = (_numbers(each) for each in (answer, expected))
    except (TypeError, ValueError):
        return f"the answer should be made of numbers, and it is a {type(answer).__name__}"
    if mine.shape != right.shape:
        shapes = [f"of shape {each.shape}" if each.ndim else "one number" for each in (right, mine)]
        return f"the answer should be {shapes[0]}, and it is {shapes[1]}"
    wrong = ~np.isclose(mine, right, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    if not wrong.any():
        return ""
    return f"{int(wrong.sum()):,} of {wrong.size:,} numbers are off" if wrong.ndim else f"it is not {mine:.4g}"


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, Sequence) and not isinstance(values, str):
        return np.asarray([_numbers(each) for each in values])
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, (pd.DataFrame, pd.Series)):
        values = values.to_numpy()
    return np.asarray(values, dtype=np.float64)
