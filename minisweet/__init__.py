"""minisweet: early-exit fine-tuning of BERT and DeBERTa, after "Finding the SWEET Spot" (Rotem et al. 2023)."""

from minisweet.checkpoint import load_encoder
from minisweet.exits import MultiExitModel, build_multi_model

__all__ = ["MultiExitModel", "build_multi_model", "load_encoder"]
