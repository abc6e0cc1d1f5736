"""The protocol of compiled models that generation and the scheduler read."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

import torch

from lorac.runtime.choice_switch import ChoiceSwitch
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.traits import ModelTraits
from lorac.target.engine import Engine


class GeneratingModel(Protocol):
    """The attributes of ``Compiled`` that generation reads."""

    engine: Engine
    switch: ChoiceSwitch
    traits: Mapping[str, ModelTraits]
    input_dtypes: Mapping[torch.dtype, torch.dtype]

    @property
    def prompt_caches(self) -> MutableMapping[int, PromptCache]: ...

    @property
    def tokenizer(self) -> Any: ...
