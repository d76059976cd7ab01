"""smaflib: multi-scale attention fusion and self-training for weakly supervised semantic segmentation.

These are the steps of the method; notebook 00 and the README use them line by line. Each is imported on first use, so
that ``import smaflib`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smaflib.cams import fuse_cams, multi_scale_cams
    from smaflib.config import Config
    from smaflib.evaluation import evaluate
    from smaflib.pseudo_masks import pseudo_mask
    from smaflib.reactivation import denoise, reactivate
    from smaflib.segmentation import train_segmenter
    from smaflib.self_training import self_train

__version__ = "0.1.0"

__all__ = [
    "multi_scale_cams",
    "fuse_cams",
    "denoise",
    "reactivate",
    "self_train",
    "pseudo_mask",
    "train_segmenter",
    "evaluate",
    "Config",
]

_HOMES = {
    "multi_scale_cams": "cams",
    "fuse_cams": "cams",
    "denoise": "reactivation",
    "reactivate": "reactivation",
    "self_train": "self_training",
    "pseudo_mask": "pseudo_masks",
    "train_segmenter": "segmentation",
    "evaluate": "evaluation",
    "Config": "config",
}

if not TYPE_CHECKING:  # a type checker that sees this function believes in every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
