"""A draft model: the model with another choice of adapters, which transformers takes as an assistant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


class DraftModel:
    """A model that generates, in another's service; what is written into its generation configuration stays its own.

    Args:
        model: the model.
        lend: has it do some work, with the adapters of a draft.
    """

    def __init__(self, model: Any, lend: Callable[[Callable[[Any], Any]], Any]) -> None:
        self._model, self._lend = model, lend
        self.generation_config = copy.deepcopy(model.generation_config)

    def generate(self, generation_config: Any, **told: Any) -> Any:
        """As the model's; options beside a configuration, of which transformers warns, become part of it."""
        config = copy.deepcopy(generation_config)
        rest = config.update(**told)
        return self._lend(lambda model: model.generate(generation_config=config, **rest))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
