"""The configuration: what a run is (method) and where it runs (cluster), as frozen pydantic models.

Unknown keys are errors, so a typo never becomes a default. An algorithm is a named variant whose defaults are the
vetted run. ``recipes.load`` turns a recipe's name or a YAML file into one ``Config``.
"""

from opd_ray.config.alignment import (
    DdpoConfig,
    DpoConfig,
    NoisedPairsConfig,
    PsoConfig,
    PsoOfflineConfig,
    RewardedConfig,
    SdpoConfig,
    StepwiseConfig,
    WhitenedConfig,
)
from opd_ray.config.cluster import Autoscale, ClusterConfig, LearnerPlacement, Placement, RewardPlacement, RolePlacement
from opd_ray.config.method import (
    ATTENTION,
    AlgorithmConfig,
    BatchConfig,
    EmaConfig,
    EvaluationConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OpdConfig,
    OptimizerConfig,
    PairsConfig,
    PluginAlgorithmConfig,
    Precision,
    PrecisionConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
    WandbConfig,
)
from opd_ray.config.reinforcement import FlowGrpoConfig, GroupsConfig, GrpoConfig, GrpoGuardConfig, NftConfig
from opd_ray.config.run import REFERENCE, Config, parse

__all__ = [
    "ATTENTION",
    "REFERENCE",
    "AlgorithmConfig",
    "Autoscale",
    "BatchConfig",
    "ClusterConfig",
    "Config",
    "DdpoConfig",
    "DpoConfig",
    "EmaConfig",
    "EvaluationConfig",
    "FlowGrpoConfig",
    "GroupsConfig",
    "GrpoConfig",
    "GrpoGuardConfig",
    "LearnerPlacement",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "NftConfig",
    "NoisedPairsConfig",
    "OpdConfig",
    "OptimizerConfig",
    "PairsConfig",
    "Placement",
    "PluginAlgorithmConfig",
    "Precision",
    "PrecisionConfig",
    "PsoConfig",
    "PsoOfflineConfig",
    "RewardPlacement",
    "RewardedConfig",
    "RolePlacement",
    "SamplingConfig",
    "SdpoConfig",
    "StepwiseConfig",
    "StudentConfig",
    "TeacherConfig",
    "WandbConfig",
    "WhitenedConfig",
    "parse",
]
