"""The stored names of a model's tensors in its checkpoint, where transformers renames or converts them on loading.

It relies on functions of transformers that PEFT uses too: ``get_model_conversion_mapping``, which lists the changes of
a model's class, ``rename_source_key``, which applies them to a name, and the ``convert`` and ``reverse_transform`` of a
change, with which transformers loads and saves a tensor.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorac.frontend.base_weights import named_tensors
from lorac.frontend.host import Host


@dataclass(frozen=True, eq=False)
class ConvertedTensors:
    """Tensors of a checkpoint from which transformers computes tensors of a model, such as a stack of experts.

    Attributes:
        model: the model; it may be on the meta device.
        converter: the change, a ``WeightConverter``.
        name: the converter's name for all of the tensors.
        sources: name in the checkpoint -> its name and pattern in the converter, in the converter's order.
    """

    model: nn.Module
    converter: Any
    name: str
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's tensors by name, as transformers computes them from the checkpoint's tensors."""
        converter = copy.deepcopy(self.converter)
        for key, (_, pattern) in self.sources.items():
            converter.add_tensor(self.name, key, pattern, stored[key])
        return self._convert(converter, self.name)

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the checkpoint's tensors by name; the inverse of ``load``."""
        converter, first = self.converter.reverse_transform(), ""
        for name, tensor in tensors.items():
            first, pattern = converter.rename_source_key(name)
            converter.add_tensor(first, name, pattern, tensor)
        made = self._convert(converter, first)
        return {key: made[known] for key, (known, _) in self.sources.items()}

    def _convert(self, converter: Any, name: str) -> dict[str, Tensor]:
        made = converter.convert(name, model=self.model, config=getattr(self.model, "config", None))
        return {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in made.items()}


def find_stored_names(model: nn.Module, stored: Collection[str]) -> tuple[dict[str, str], list[ConvertedTensors]]:
    """Return model name -> checkpoint name for tensors that are loaded unchanged, and the converted tensors.

    Args:
        model: the model; it may be on the meta device.
        stored: the names in the checkpoint.
    """
    known = named_tensors(model)
    found = {name: name for name in stored if name in known}
    changes = None if len(found) == len(stored) else Host.of(model).checkpoint_changes()
    if changes is None:
        return found, []
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = {
        pattern: one for one in changes if isinstance(one, WeightConverter) for pattern in one.source_patterns
    }
    every, prefix = list(dict.fromkeys(converters.values())), str(model.base_model_prefix)
    converted: dict[str, ConvertedTensors] = {}
    for name in sorted({*stored} - found.keys(), key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, every, prefix, known)
        if pattern is not None:
            one = converted.setdefault(renamed, ConvertedTensors(model, converters[pattern], renamed))
            one.sources[name] = (rename_source_key(name, renamings, [], prefix, known)[0], pattern)
        elif renamed in known:
            found.setdefault(renamed, name)
    return found, list(converted.values())
