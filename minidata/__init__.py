"""A data set that is drawn by code: ``drawing`` says how things and scenes look, ``dataset`` where they are placed."""

from minidata.dataset import CLASS_NAMES, draw_scene, make_mini

__all__ = ["CLASS_NAMES", "draw_scene", "make_mini"]
