"""The name under which programs import the ResNet50 in stages; it lies in src/engine/pipeline/."""

from src.engine.pipeline.model_parallel_resnet50 import BLOCKS, CUTS, UNITS, ModelParallelResNet50, stage_bounds

__all__ = ["BLOCKS", "CUTS", "UNITS", "ModelParallelResNet50", "stage_bounds"]
