"""Plain tables of what can be built, and the one function that builds it."""

from camoxpert.config import ModelConfig
from camoxpert.models.backbone import BACKBONES
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.experts import EXPERTS
from camoxpert.models.moe import DISPATCH

__all__ = ["BACKBONES", "DISPATCH", "EXPERTS", "build_model"]


def build_model(config: ModelConfig) -> CamoXpert:
    """Build the network; raises ConfigError or CheckpointError for a user's mistake."""
    return CamoXpert(config)
