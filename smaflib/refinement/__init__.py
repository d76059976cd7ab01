"""Refinement of masks by the image's own edges."""

from smaflib.refinement.crf import dense_crf
from smaflib.refinement.parallel import dense_crf_many

__all__ = ["dense_crf", "dense_crf_many"]
