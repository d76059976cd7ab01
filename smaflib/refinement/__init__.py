"""Refinement of masks by the image's own edges."""

from smaflib.refinement.crf import dense_crf

__all__ = ["dense_crf"]
