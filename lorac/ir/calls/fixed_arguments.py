"""Arguments of a host's forward that are constants of its program, and their values as JSON."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

OUTPUT_SWITCHES = ("return_dict", "output_hidden_states", "output_attentions")
"""Arguments of transformers models that their configuration has too."""
CAPTURE_CONFIG = {"use_cache": False}
"""Fields that a capture sets in the configuration of a transformers model: its graph keeps no cache."""


def to_json_value(value: object) -> object:
    """Return a value as JSON has it: tensors and arrays as lists of numbers, tuples as lists."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [to_json_value(inner) for inner in value]
    return {key: to_json_value(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
