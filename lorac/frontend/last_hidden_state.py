"""The module of a transformers model that gives its last hidden state, found by running the model once."""

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import SiteError
from lorac.frontend.host import Host
from lorac.frontend.model_runner import check_runs, preserve_random_state

_SWITCH = "output_hidden_states"
"""Argument of forward, or field of the configuration, that asks for hidden states."""


@torch.no_grad()
def find_last_hidden_state(model: nn.Module) -> tuple[str, int]:
    """Return the path of the module whose output is a model's last hidden state, and the width of that state.

    Args:
        model: a transformers model; a copy of it is run once.

    Raises:
        SiteError: the model returns no hidden states, or no module returns the last one.
        BaseNeeded: the model is on the meta device.
    """
    host = Host.of(model)
    if _SWITCH not in host.defaults():
        raise _no_hidden_state(f"{type(model).__name__} returns no hidden states")
    check_runs(model)
    copied, outputs = host.copy().model.eval(), dict[str, Tensor]()

    def record(path: str, output: object) -> None:
        first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None:
            outputs[path] = first

    for path, module in copied.named_modules():
        if path:
            module.register_forward_hook(lambda _, __, output, path=path: record(path, output))
    with preserve_random_state(model):
        states = getattr(copied(**host.example_inputs(), **{_SWITCH: True}), "hidden_states", None)
    if not states:
        raise _no_hidden_state(f"{type(model).__name__} returns no hidden states")
    last = states[-1]
    # Several modules may pass it on, such as the model's trunk; the innermost of them returns it first.
    found = next((path for path, output in outputs.items() if output.shape == last.shape and output.equal(last)), None)
    if found is None:
        raise _no_hidden_state(f"no module of {type(model).__name__} returns its last hidden state")
    return found, int(last.shape[-1])


def _no_hidden_state(what: str) -> SiteError:
    return SiteError(what, next_step="name the module that returns it: hidden='model.norm'", code="site_not_found")
