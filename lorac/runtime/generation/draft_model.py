"""A model with another choice of adapters, as transformers takes an assistant model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


class DraftModel:
    """A model that drafts tokens for the same model with other adapters.

    Changes to its generation configuration do not reach the model's.

    Args:
        model: the model, or the driver in its place.
        run: runs work on the model with the adapters of the draft.
    """

    def __init__(self, model: Any, run: Callable[[Callable[[Any], object]], object]) -> None:
        self._model, self._run = model, run
        self.generation_config = copy.deepcopy(model.generation_config)

    def generate(self, generation_config: Any, **options: Any) -> object:
        """Generate; further options are merged into the configuration, since transformers warns of both at once."""
        config = copy.deepcopy(generation_config)
        rest = config.update(**options)
        return self._run(lambda model: model.generate(generation_config=config, **rest))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
