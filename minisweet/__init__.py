"""minisweet: early-exit fine-tuning of BERT and DeBERTa, after "Finding the SWEET Spot" (Rotem et al. 2023)."""

from minisweet.exits import MultiExitModel, build_multi_model
from minisweet.files.checkpoint import load_encoder

__all__ = ["MultiExitModel", "build_multi_model", "load_encoder"]
