"""Parameters that several layers share, and that an adapter may change in only one of them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorac.errors import list_some, warn


def find_ties(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several names in a model."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def find_kept_ties(model: nn.Module, merged: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of each shared parameter that stays shared, since the merged values are equal under all names.

    A warning names the parameters that are changed and untied.

    Args:
        model: the model before merging.
        merged: name -> merged tensor.
    """
    for names in find_ties(model):
        changed = [name for name in names if name in merged]
        if len(changed) == len(names) and all(torch.equal(merged[names[0]], merged[name]) for name in names[1:]):
            yield names
        elif changed:
            warn(
                f"{list_some(names)} were one tensor, and are several now, since the adapters change "
                f"{list_some(changed)} {'differently' if len(changed) == len(names) else 'alone'}",
                next_step="a checkpoint of the merged model stores each of them",
            )
