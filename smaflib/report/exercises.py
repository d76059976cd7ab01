"""Checks the answers to the notebooks' exercises, and folds their solutions."""

import base64
import contextlib
import textwrap
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import numpy as np
import torch

TOLERANCE = 5e-3  # absolute or relative: people round


def check(answer: Any, right: Callable[[], Any], look_at: str) -> None:
    """Print whether an answer is right; a wrong one gets the hint ``look_at`` and never the solution.

    Args:
        answer: a number, a sequence, array, tensor or table of numbers, or a set of names; None: not answered yet.
        right: computes the right answer, only if there is one to compare; None where this run has no ground truth.
    """
    if answer is None:
        print("No answer yet. Put yours in place of None in the cell above, run it, then this one.")
    elif (expected := right()) is None:
        print("This run has nothing to compare with (no ground truth, or no ablation): see the solution.")
    else:
        trouble = _difference(answer, expected)
        print(f"Not yet: {trouble}. {look_at}" if trouble else "Right.")


@contextlib.contextmanager
def solution() -> Iterator[None]:
    """Fold what a cell's block prints and displays, together with its code, under the word *Solution*.

    JupyterLab unfolds hidden outputs when a cell runs; this output opens on a click only. An error is shown at once.
    """
    from IPython.core.getipython import get_ipython
    from IPython.display import HTML, display
    from IPython.utils.capture import capture_output

    with capture_output() as captured:
        yield
    source: str = get_ipython().user_ns["In"][-1]  # type: ignore[union-attr]  # there is one in a notebook
    block = source.partition("with solution():\n")[2]
    parts = [f"<pre><code>{escape(textwrap.dedent(block))}</code></pre>", f"<pre>{escape(captured.stdout)}</pre>"]
    for data in (output.data for output in captured.outputs):
        png = data.get("image/png", b"")
        png = png if isinstance(png, str) else base64.b64encode(png).decode()
        parts += [f'<img src="data:image/png;base64,{png}" alt="solution">' if png else data.get("text/html", "")]
    display(HTML('<details class="solution"><summary>Solution</summary>\n' + "\n".join(parts) + "</details>"))


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
