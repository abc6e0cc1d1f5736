"""The names of a model's tensors in its checkpoint, where transformers renames them when it loads.

It relies on two functions of transformers that PEFT uses as well: ``get_model_conversion_mapping``, which lists the
changes that a model's class makes, and ``rename_source_key``, which applies them to a name.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorac.frontend.hugging_face import is_hugging_face


def find_stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Return name in the model -> name in its checkpoint, of the tensors that are loaded as they are stored.

    Tensors that are computed from others when they are loaded, such as stacks of experts, have no such name.

    Args:
        model: the model; it may be on the meta device.
        stored: the names in the checkpoint.
    """
    known = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    names = list(stored)
    found = {name: name for name in names if name in known}
    if len(found) == len(names) or not is_hugging_face(model):
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    for name in sorted(set(names) - found.keys()):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converter is None and renamed in known:
            found.setdefault(renamed, name)
    return found
