"""The model with another choice of adapters, in the role of transformers' assistant model."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from lorac.runtime.generation.request import GenerateRequest

_SETTINGS = ("assistant_confidence_threshold", "num_assistant_tokens", "num_assistant_tokens_schedule")
"""Options that transformers reads from the assistant's generation configuration, not from the call's."""


class DraftModel:
    """A model that drafts tokens for the same model with other adapters.

    Its generation configuration is a copy: changes do not reach the model's.

    transformers evaluates stopping criteria once for all the tokens that a draft adds. So a greedy draft ends before
    the token that would stop the sequence: the model itself then adds that token last.

    Args:
        model: the model, or a driver.
        run: calls a function with the model while the draft's adapters are active.
        request: the options of the call.
    """

    def __init__(self, model: Any, run: Callable[[Callable[[Any], object]], Any], request: GenerateRequest) -> None:
        self._model, self._run = model, run
        self._criteria = [] if request.option("do_sample") else request.stopping_criteria()
        self.generation_config = copy.deepcopy(model.generation_config)
        given = {name: request.option(name) for name in _SETTINGS}
        self.generation_config.update(**{name: value for name, value in given.items() if value is not None})

    def generate(self, generation_config: Any, **options: Any) -> Any:
        """Generate; options are merged into the configuration, since transformers warns where a call gives both."""
        config = copy.deepcopy(generation_config)
        rest = config.update(**options)
        config.stop_strings = None
        output = self._run(lambda model: model.generate(generation_config=config, **rest))
        return self._cut(output)

    def _cut(self, output: Any) -> Any:
        """Cut an output before the first drafted token that stops the sequence."""
        begin = output.sequences.shape[1] - len(output.scores)
        for count in range(len(output.scores)) if self._criteria else ():
            stops = [criterion(output.sequences[:, : begin + count + 1], None) for criterion in self._criteria]
            if any(bool(torch.as_tensor(stop).all()) for stop in stops):
                output.sequences = output.sequences[:, : begin + count]
                output.scores = output.scores[: max(count, 1)]
                break
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
