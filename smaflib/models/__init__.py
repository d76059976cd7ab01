"""Backbones, the networks of the method, and weights from files."""

from smaflib.errors import WeightsError
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork, load_attention_network, with_background
from smaflib.models.weights import read_weights

__all__ = [
    "AttentionNetwork",
    "SegmentationNetwork",
    "WeightsError",
    "load_attention_network",
    "read_weights",
    "with_background",
]
