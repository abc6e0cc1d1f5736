"""Parts of a transformer found by one run of a copy: its blocks, and its last hidden state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import SiteError
from lorac.frontend.components import get_component_prefix
from lorac.frontend.host import Host
from lorac.frontend.model_runner import WatchingMode, check_runs, preserve_random_state, seed_random_numbers
from lorac.frontend.model_view import ModelView
from lorac.ir.calls.call import CAPTURE_CONFIG
from lorac.ir.sites.site import Site, SiteKind

_WEIGHT_AXES = 4
"""Number of axes of attention weights: rows, heads, queries, keys."""
_SEED = 0


def find_transformer_blocks(view: ModelView, inputs: object = None) -> tuple[str, ...]:
    """Return the paths of a transformer's blocks in call order; empty if no attention is computed.

    A block is an element of a list in which every called element computes an attention and returns the width of its
    weights, and which contains no such list. Stages, sublayers and layers between stages are not blocks.

    Args:
        view, inputs: as ``trace_residual_stream`` takes them.
    """
    return tuple(path for part in iter_components(view, inputs) for path in _find_blocks(*part))


def iter_components(view: ModelView, inputs: object) -> Iterator[tuple[nn.Module, str, dict[str, Site], object]]:
    """Yield each component of a model, its path prefix, its sites by paths within it, and its inputs.

    Args:
        inputs: example inputs, by component or for all components.
    """
    by_component = isinstance(inputs, Mapping) and view.components.keys() >= inputs.keys()
    for name, component in view.components.items():
        prefix = get_component_prefix(view.module, name)
        sites = {path.removeprefix(prefix): site for path, site in view.sites.items() if path.startswith(prefix)}
        yield component, prefix, sites, inputs.get(name) if by_component else inputs  # type: ignore[attr-defined]  # a mapping


def _find_blocks(model: nn.Module, prefix: str, all_sites: Mapping[str, Site], inputs: object) -> list[str]:
    sites = {path: site for path, site in all_sites.items() if site.kind is SiteKind.BLOCK}
    counter = _AttentionCounter()
    entered: dict[str, int] = {}
    attends: dict[str, bool] = {}

    def enter(path: str) -> Callable[[nn.Module, object], None]:
        return lambda module, args: entered.__setitem__(path, counter.count)

    def leave(path: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, args: object, output: object) -> None:
            width = next((leaf.shape[-1] for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), 0)
            attends[path] = counter.count > entered[path] and width == sites[path].out_features

        return record

    copied = copy_for_hooks(model)
    for path in sites:
        copied.get_submodule(path).register_forward_pre_hook(enter(path))
        copied.get_submodule(path).register_forward_hook(leave(path))
    run_under_dispatch_mode(copied, model, inputs, counter)

    def is_block_list(container: str) -> bool:
        elements = [
            f"{container}.{name}".removeprefix(".") for name, _ in model.get_submodule(container).named_children()
        ]
        return all(path in sites and attends.get(path, True) for path in elements)

    lists = {container for path in attends if is_block_list(container := path.rpartition(".")[0])}
    blocks = [path for path in entered if path.rpartition(".")[0] in lists]
    outer = [path for path in blocks if not any(f"{container}.".startswith(f"{path}.") for container in lists)]
    return [prefix + path for path in outer]


class _AttentionCounter(WatchingMode):
    """A mode that counts attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.count += is_attention_op(str(op), args)
        return op(*args, **kwargs)


def is_attention_op(name: str, args: Sequence[object]) -> bool:
    """Return whether a call of an op computes attention weights, or a whole attention."""
    if "scaled_dot_product" in name:
        return True
    return "softmax" in name and isinstance(args[0], Tensor) and args[0].dim() >= _WEIGHT_AXES


def copy_for_hooks(model: nn.Module) -> nn.Module:
    """Return a copy of a model, in eval mode, on which hooks may be registered."""
    return Host.of(model).copy().configure(CAPTURE_CONFIG).model.eval()


def run_under_dispatch_mode(copied: nn.Module, model: nn.Module, inputs: object, mode: WatchingMode) -> None:
    """Run a copy of a model on example inputs under a dispatch mode, and preserve the random states.

    Args:
        copied: ``copy_for_hooks(model)``.
        model: the model, which determines default inputs and argument names.
        inputs: example inputs; None: they are made.
        mode: the mode that observes the ops.
    """
    check_runs(copied)
    given = Host.of(model).bind(inputs)
    with torch.no_grad(), seed_random_numbers(copied, _SEED), mode:
        copied(**given)


_SWITCH = "output_hidden_states"
"""Argument of forward, or configuration field, that requests hidden states."""


@torch.no_grad()
def find_last_hidden_state(model: nn.Module) -> tuple[str, int]:
    """Return the path of the module that returns a model's last hidden state, and the width of this state.

    Args:
        model: a transformers model; a copy runs once.

    Raises:
        SiteError: the model returns no hidden states, or no module returns the last hidden state.
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
    # Several modules may return it, such as the model's trunk; the innermost returns it first.
    found = next((path for path, output in outputs.items() if output.shape == last.shape and output.equal(last)), None)
    if found is None:
        raise _no_hidden_state(f"no module of {type(model).__name__} returns its last hidden state")
    return found, int(last.shape[-1])


def _no_hidden_state(what: str) -> SiteError:
    return SiteError(what, next_step="name the module that returns it: hidden='model.norm'", code="site_not_found")
