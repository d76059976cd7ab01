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
    ModelConfig,
    ParConfig,
    PseudoMaskConfig,
    SegmentationConfig,
    SelfTrainingConfig,
    StageConfig,
    TrainingConfig,
)

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
    "ModelConfig",
    "ParConfig",
    "PseudoMaskConfig",
    "SegmentationConfig",
    "SelfTrainingConfig",
    "StageConfig",
    "TrainingConfig",
    "check_settings",
    "config_differences",
    "dump_config",
    "flat_settings",
    "load_config",
]
