"""Every constant of the method, and the settings of a run: checked before anything starts."""

from smaflib.config.loading import check_settings, config_differences, dump_config, flat_settings, load_config
from smaflib.config.presets import CRF_PRESETS
from smaflib.config.schema import (
    AttentionConfig,
    ClassifierConfig,
    Config,
    CrfBackend,
    CrfConfig,
    DataConfig,
    EvaluationConfig,
    FusionRule,
    HeadSolverConfig,
    ModelConfig,
    OwnRefinement,
    ParConfig,
    PseudoMaskConfig,
    SegmentationConfig,
    SelfTrainingConfig,
    Split,
    StageConfig,
    TrainingConfig,
)
from smaflib.config.variants import Variant, variant_label

__all__ = [
    "CRF_PRESETS",
    "AttentionConfig",
    "ClassifierConfig",
    "Config",
    "CrfBackend",
    "CrfConfig",
    "DataConfig",
    "EvaluationConfig",
    "FusionRule",
    "HeadSolverConfig",
    "ModelConfig",
    "OwnRefinement",
    "ParConfig",
    "PseudoMaskConfig",
    "SegmentationConfig",
    "SelfTrainingConfig",
    "Split",
    "StageConfig",
    "TrainingConfig",
    "Variant",
    "check_settings",
    "config_differences",
    "dump_config",
    "flat_settings",
    "load_config",
    "variant_label",
]
