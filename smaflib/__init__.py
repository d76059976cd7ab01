"""smaflib: multi-scale attention fusion and self-training for weakly supervised semantic segmentation.

An image, a network, the steps of the method and the picture of them; notebook 00 and the README use them line by line.
Each is imported on first use, so that ``import smaflib`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "open_image": "data.voc",
    "wrap": "models.wrap",
    "multi_scale_cams": "cams",
    "fuse_cams": "cams",
    "denoise": "reactivation",
    "reactivate": "reactivation",
    "self_train": "self_training",
    "pseudo_mask": "pseudo_masks",
    "show_scales": "report.plots",
    "train_segmenter": "segmentation",
    "evaluate": "evaluation",
    "Config": "config",
}
__all__ = list(_MODULES)

if TYPE_CHECKING:
    from smaflib.cams import fuse_cams as fuse_cams
    from smaflib.cams import multi_scale_cams as multi_scale_cams
    from smaflib.config import Config as Config
    from smaflib.data.voc import open_image as open_image
    from smaflib.evaluation import evaluate as evaluate
    from smaflib.models.wrap import wrap as wrap
    from smaflib.pseudo_masks import pseudo_mask as pseudo_mask
    from smaflib.reactivation import denoise as denoise
    from smaflib.reactivation import reactivate as reactivate
    from smaflib.report.plots import show_scales as show_scales
    from smaflib.segmentation import train_segmenter as train_segmenter
    from smaflib.self_training import self_train as self_train
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
