"""What a check cell says to wrong and misshapen answers; right ones are in test_notebooks.py."""

from __future__ import annotations

from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from smaflib.report.exercises import check


@pytest.mark.parametrize(
    ("answer", "right", "why"),
    [
        (0.7, 0.6134, "Mismatched elements: 1 / 1"),
        ([1, 2, 4], [1, 2, 6134], "Mismatched elements: 1 / 3"),
        ([1, 2], [1, 2, 6134], "shapes (2,), (3,) mismatch"),
        ([1, [2, 3]], [1, 6134], "inhomogeneous shape"),
        ("many", 6134, "could not convert string to float: 'many'"),
        ({"ram", "cat"}, {"ram", "6134"}, "1 too many and 1 missing in the set"),
        (3, {"6134"}, "'int' object is not iterable"),
    ],
)
def test_a_wrong_answer_gets_a_reason_and_a_hint_but_not_the_solution(
    answer: Any, right: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(answer, lambda: right, "Look there.")
    told = capsys.readouterr().out
    assert told.startswith("Not yet: ") and why in told and told.endswith(" Look there.\n") and "6134" not in told


def test_nothing_is_computed_without_an_answer_and_a_run_may_be_unable_to_tell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(None, lambda: pytest.fail("computed"), "Look.")
    check(1, lambda: None, "Look.")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("No answer yet.") and second.startswith("This run has nothing to compare with")


SOLVED = """from smaflib.report.exercises import solution

with solution():
    total = 1 < 2
    print("solved:", total)
    display({"image/png": "iVBO"}, raw=True)
    display({"text/html": "<table>1</table>"}, raw=True)
"""


def test_a_solution_is_folded_with_its_code_and_leaves_its_variables() -> None:
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    try:
        with capture_output() as shown:
            assert shell.run_cell(SOLVED, store_history=True).success
        (folded,) = [output.data["text/html"] for output in shown.outputs]
        assert shown.stdout == "" and folded.startswith('<details class="solution"><summary>Solution</summary>')
        for part in (
            "<code>total = 1 &lt; 2\n",
            "<pre>solved: True\n",
            'src="data:image/png;base64,iVBO"',
            "<table>1</table>",
        ):
            assert part in folded
        assert "open" not in folded.partition(">")[0] and shell.user_ns["total"] is True
        assert not shell.run_cell("with solution():\n    1 / 0", store_history=True).success
    finally:
        InteractiveShell.clear_instance()
