"""Which module of a model gives its last hidden state, by asking the model: no rule of structure tells it of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import SiteError
from lorac.frontend.copying import copy_structure
from lorac.frontend.example_inputs import make_example_inputs
from lorac.frontend.hugging_face import is_hugging_face
from lorac.frontend.model_runner import preserve_random_state


@torch.no_grad()
def find_last_hidden_state(model: nn.Module) -> tuple[str, int]:
    """The path of the module whose output is a model's last hidden state, and how wide it is.

    Args:
        model: one of transformers', which answers hidden states when it is asked to; it is run once, on a copy.

    Raises:
        SiteError: it gives none, or no module gives what it does.
    """
    if not is_hugging_face(model):
        raise _unknown(f"{type(model).__name__} answers no hidden states")
    copy, given = copy_structure(model).eval(), dict[str, Tensor]()

    def note(path: str, output: Any) -> None:
        first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
        given.update({} if first is None else {path: first})

    for path, module in copy.named_modules():
        if path:
            module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
    with preserve_random_state(model):
        states = getattr(copy(**make_example_inputs(model), output_hidden_states=True), "hidden_states", None)
    if not states:
        raise _unknown(f"{type(model).__name__} answers no hidden states")
    # The innermost of those that give it on is the first to: a model's trunk gives it too.
    found = next((path for path, output in given.items() if _same(output, states[-1])), None)
    if found is None:
        raise _unknown(f"no module of {type(model).__name__} gives its last hidden state")
    return found, int(states[-1].shape[-1])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _unknown(what: str) -> SiteError:
    return SiteError(
        what, next_step="say which module gives it, by its path: hidden='model.norm', for one", code="site_not_found"
    )
