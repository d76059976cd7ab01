"""Backbones, the networks of the method, and weights from files."""

from smaflib.models.networks import AttentionNetwork, SegmentationNetwork, load_attention_network, with_background

__all__ = ["AttentionNetwork", "SegmentationNetwork", "load_attention_network", "with_background"]
