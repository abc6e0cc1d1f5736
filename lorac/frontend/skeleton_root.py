"""The root of what stands for a model, or for several, whose forward is gone."""

from collections.abc import Mapping

from torch import nn


class Skeleton(nn.Module):
    """The root of a skeleton; returns the embeddings as a transformers model does.

    Args:
        embeddings: which one -> its path.
        several: whether its children are models of their own, compiled together.
    """

    def __init__(self, embeddings: Mapping[str, str], *, several: bool = False) -> None:
        super().__init__()
        self._embeddings, self.several = dict(embeddings), several

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the module that embeds the input, or None."""
        return self._embedding("input")

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer, or None."""
        return self._embedding("output")

    def _embedding(self, role: str) -> nn.Module | None:
        path = self._embeddings.get(role)
        return None if path is None else self.get_submodule(path)
