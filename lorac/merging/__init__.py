"""One adapter from several, one file per way, and adapters merged into the weights of a model."""

from lorac.merging.registry import ways

__all__ = ["ways"]
