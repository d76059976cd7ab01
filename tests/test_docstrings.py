"""The examples in the docstrings of the method: each is executed, and its result is what stands there."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

FUNCTIONS = {
    "cams": ("multi_scale_cams", "fuse_cams", "size_adaptive_weights"),
    "reactivation": ("denoise", "blend_saliency", "reactivate", "hard_targets", "with_background_score", "hard_labels"),
    "classifier": ("classification_loss",),
    "self_training": ("mac_loss",),
    "thresholds": ("choose_bg_score",),
    "pseudo_masks": ("pseudo_mask",),
    "refinement.crf": ("dense_crf",),
    "refinement.par": ("pixel_adaptive_refinement",),
    "evaluation": ("confusion_matrix", "intersection_over_union", "evaluate", "object_scores", "compare_masks"),
}
"""Functions that must have an example, by module."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_give_what_they_say(name: str) -> None:
    module = import_module(f"smaflib.{name}")
    found = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module) if test.examples}
    assert set(FUNCTIONS[name]) <= found.keys()
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    for test in found.values():
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
