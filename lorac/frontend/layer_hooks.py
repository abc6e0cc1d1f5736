"""Forward hooks of adapted layers.

A hook that changes the inputs or outputs of a layer is ambiguous there: PEFT's layer runs it on the base's product
alone, and on the adapted one once the adapter is merged. So it is refused; a hook that changes nothing is kept.
"""

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import SiteError

Hook = Callable[..., object]


def guard_hooks(layer: nn.Module, path: str, is_adapted: Callable[[], bool] = lambda: True) -> None:
    """Make the forward hooks of a copy's layer raise where they change an adapted layer's input or output, in place.

    Args:
        path: of its site, for the message.
        is_adapted: whether an adapter acts on the running call.
    """
    for key, hook in layer._forward_pre_hooks.items():
        layer._forward_pre_hooks[key] = functools.partial(_run, hook, slice(1, None), path, is_adapted)
    for key, hook in layer._forward_hooks.items():
        layer._forward_hooks[key] = functools.partial(_run, hook, slice(-1, None), path, is_adapted)


def _run(hook: Hook, subject: slice, path: str, is_adapted: Callable[[], bool], *arguments: object) -> object:
    """Run a hook, and raise ``SiteError`` if it changes its subject.

    Args:
        subject: which of the arguments it may change: what the layer takes, or what it returns.
        path, is_adapted: as ``guard_hooks`` takes them.
        *arguments: those of the hook; the first is the layer.
    """
    before = pytree.tree_leaves(arguments[subject])
    writes = [_count_writes(leaf) for leaf in before]
    result = hook(*arguments)
    after = before if result is None else pytree.tree_leaves(result)
    same = len(after) == len(before) and all(one is other for one, other in zip(after, before, strict=True))
    if is_adapted() and not (same and writes == [_count_writes(leaf) for leaf in before]):
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise SiteError(
            f"the forward hook {name} of '{path}' changes what the layer takes or returns: PEFT runs it before the "
            "adapter's part is added, and after it once that is merged",
            next_step="register it on a module around the layer, or remove it and exclude= the layer",
        )
    return result


def _count_writes(value: object) -> int:
    """Return how often torch has written into a tensor; it counts nothing for one made in inference mode."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
