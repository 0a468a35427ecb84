"""YAML + dotted overrides -> frozen, typed, strict; the only place where an option is described."""

from jdistill.config.loading import load, parse
from jdistill.config.objective import BehaviorSection, ObjectiveSection, ReferenceSection, ScheduleSection
from jdistill.config.section import ConfigError, Section
from jdistill.config.sidecar import EngineSection, TeacherServerConfig
from jdistill.config.training import (
    CheckpointSection,
    EvalSection,
    LoraSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    RolloutSection,
    SpawnSection,
    TaskSection,
    TeacherSection,
    TrainConfig,
)

__all__ = [
    "BehaviorSection",
    "CheckpointSection",
    "ConfigError",
    "EngineSection",
    "EvalSection",
    "LoraSection",
    "MeshSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "ReferenceSection",
    "RolloutSection",
    "ScheduleSection",
    "Section",
    "SpawnSection",
    "TaskSection",
    "TeacherSection",
    "TeacherServerConfig",
    "TrainConfig",
    "load",
    "parse",
]
