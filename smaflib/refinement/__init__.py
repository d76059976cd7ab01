"""Refinement of masks by the edges of the image."""

from smaflib.refinement.crf import choose_backend, dense_crf
from smaflib.refinement.mean_field import kernels_seen_from
from smaflib.refinement.par import pixel_adaptive_refinement
from smaflib.refinement.parallel import refine, refine_many

__all__ = ["choose_backend", "dense_crf", "kernels_seen_from", "pixel_adaptive_refinement", "refine", "refine_many"]
