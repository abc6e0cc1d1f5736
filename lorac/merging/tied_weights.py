"""Parameters that several layers share; an adapter may change them in one layer alone."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorac.errors import list_some, warn


def find_ties(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter of a model that has several."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def find_kept_ties(model: nn.Module, merged: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of each shared parameter that stays shared, since the same is merged under all of its names.

    A warning names those that are changed and do not stay shared.

    Args:
        model: the model before.
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
