"""The mini data set, drawn by code: ``drawing`` knows how things and scenes look, ``dataset`` what stands where."""

from smaflib.data.mini.dataset import CLASS_NAMES, draw_scene, make_mini

__all__ = ["CLASS_NAMES", "draw_scene", "make_mini"]
