"""Settings of the dense CRF by name."""

from __future__ import annotations

from typing import Any

CRF_PRESETS: dict[str, dict[str, Any]] = {
    # the paper's reference implementation: the defaults below
    "reference": {},
    # IRN's cam_to_ir_label.py (Ahn et al., CVPR 2019): the same among the labels that the mask holds
    "irn": {"labels": "present"},
    # DeepLab's test-time CRF for VOC (Chen et al., TPAMI 2018), on the softmax of a segmentation network
    "deeplab": {
        "unary": "scores",
        "gaussian_sxy": 1.0,
        "bilateral_sxy": 67.0,
        "bilateral_srgb": 3.0,
        "bilateral_compat": 4.0,
    },
    # images of 128 pixels, in a fraction of a second
    "mini": {
        "iterations": 5,
        "gaussian_sxy": 1.5,
        "bilateral_sxy": 20.0,
        "bilateral_srgb": 8.0,
        "bilateral_compat": 6.0,
    },
    # the same size, from the maps' scores: tuned on mini's training split by benchmarks/soft_preset.py
    "soft": {
        "iterations": 5,
        "unary": "scores",
        "sharpness": 1.5,
        "gaussian_sxy": 1.5,
        "gaussian_compat": 1.0,
        "bilateral_sxy": 20.0,
        "bilateral_srgb": 8.0,
        "bilateral_compat": 6.0,
    },
}
"""Known settings by name: ``crf: irn`` in a file, or ``crf: {preset: irn, iterations: 5}`` for one with changes."""

PRESET_GROUPS = ("crf", "test_crf")
"""Groups of settings that can be given as a preset's name."""
