"""Merging of several adapters into one, in many ways, and merging of adapters into the weights of a model."""

from lorac.merging.federation import FederatedStack
from lorac.merging.merged_checkpoint import MergedCheckpoint, merge_checkpoint
from lorac.merging.registry import ways

__all__ = ["FederatedStack", "MergedCheckpoint", "merge_checkpoint", "ways"]
