"""Arguments of a host's forward that are constants of its program, and their values as JSON."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

OUTPUT_SWITCHES = ("return_dict", "output_hidden_states", "output_attentions")
"""Arguments of transformers models that are also fields of the configuration."""
CAPTURE_CONFIG = {"use_cache": False}
"""Fields that a capture sets in the configuration of a transformers model: its graph keeps no cache."""


def to_json_value(value: object) -> object:
    """Convert a value to JSON: tensors and arrays to lists of numbers, tuples to lists."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [to_json_value(inner) for inner in value]
    return {key: to_json_value(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
