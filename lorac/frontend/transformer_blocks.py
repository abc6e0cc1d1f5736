"""The blocks that a transformer repeats, found by running it once; and how a copy of a model is run to be watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorac.frontend.call_binding import bind_by_name
from lorac.frontend.components import get_component_prefix
from lorac.frontend.copying import copy_structure
from lorac.frontend.example_inputs import make_example_inputs
from lorac.frontend.hugging_face import set_config_fields
from lorac.frontend.model_runner import seed_random_numbers
from lorac.frontend.model_view import ModelView
from lorac.ir.sites import Site, SiteKind

_HEADS = 4
"""Axes of attention weights: rows, heads, and positions twice."""
_SEED = 0


def get_component_inputs(inputs: object, view: ModelView, name: str) -> object:
    """Return the example inputs of one component, where they are given by component; else all of them."""
    by_component = isinstance(inputs, Mapping) and view.components.keys() >= inputs.keys()
    return inputs.get(name) if by_component else inputs  # type: ignore[attr-defined]  # a mapping


def find_transformer_blocks(view: ModelView, inputs: object = None) -> tuple[str, ...]:
    """Paths of the blocks that a transformer repeats, in the order of their calls; none where no attention is computed.

    A block is an element of a list whose every element, where it is called, computes an attention and answers what is
    as wide as its weights say, and that has no such list inside: not a stage, a sublayer, or what lies between stages.

    Args:
        view, inputs: as ``trace_residual_stream`` takes them.
    """
    found: list[str] = []
    for name, component in view.components.items():
        prefix = get_component_prefix(view.module, name)
        given = get_component_inputs(inputs, view, name)
        found += [prefix + path for path in _attending_blocks(component, view.component_sites(name), given)]
    return tuple(found)


def _attending_blocks(model: nn.Module, all_sites: Mapping[str, Site], inputs: object) -> list[str]:
    sites = {path: site for path, site in all_sites.items() if site.kind is SiteKind.BLOCK}
    computed: dict[str, bool] = {}
    watch = _AttentionCounter()
    began: dict[str, int] = {}

    def entering(path: str) -> Any:
        return lambda module, args: began.__setitem__(path, watch.count)

    def leaving(path: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            width = next((leaf.shape[-1] for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), 0)
            computed[path] = watch.count > began[path] and width == sites[path].out_features

        return note

    copied = make_runnable_copy(model)
    for path in sites:
        copied.get_submodule(path).register_forward_pre_hook(entering(path))
        copied.get_submodule(path).register_forward_hook(leaving(path))
    run_under_dispatch_mode(
        copied, bind_by_name(model, make_example_inputs(model) if inputs is None else inputs), watch
    )
    inner = {held for path in computed if _is_list(model, held := path.rpartition(".")[0], sites, computed)}
    whole = [path for path in began if path.rpartition(".")[0] in inner]
    return [path for path in whole if not any(f"{held}.".startswith(f"{path}.") for held in inner)]


def _is_list(model: nn.Module, held: str, sites: Mapping[str, Site], computed: Mapping[str, bool]) -> bool:
    """Whether every element of a list is a block, and computes an attention where it is called."""
    elements = [f"{held}.{name}".removeprefix(".") for name, _ in model.get_submodule(held).named_children()]
    return all(path in sites and computed.get(path, True) for path in elements)


class _AttentionCounter(TorchDispatchMode):
    """Counts attentions as they are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_attention_op(str(func), args)
        return func(*args, **(kwargs or {}))


def is_attention_op(name: str, args: Any) -> bool:
    """Whether a call of an op computes attention weights: itself, or all of an attention."""
    return "scaled_dot_product" in name or ("softmax" in name and args[0].dim() >= _HEADS)


def make_runnable_copy(model: nn.Module) -> nn.Module:
    """A copy to hang hooks on."""
    copied = copy_structure(model).eval()
    set_config_fields(copied)
    return copied


def run_under_dispatch_mode(copied: nn.Module, given: Mapping[str, Any], watch: TorchDispatchMode) -> None:
    """Run a copy under something that watches its ops; random numbers leave no trace."""
    with torch.no_grad(), seed_random_numbers(copied, _SEED), watch:
        copied(**given)
