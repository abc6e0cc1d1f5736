"""Ops for sites: each site of a copy calls an op, so that a capture has one node per call of a site."""

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import CaptureError, nearest_name
from lorac.frontend.copying import separate_layers
from lorac.frontend.layer_classes import (
    Forward,
    calls_super_forward,
    guard_hooks,
    has_plain_forward,
    pad_conv_input,
    replace_super_forward,
)
from lorac.frontend.site_discovery import is_gpt2_conv1d, read_conv_geometry
from lorac.ir.slots.program_values import first_tensor, replace_first_tensor, split_output


@dataclass(frozen=True)
class SiteMarks:
    """Marks of sites and blocks in a copy of a model.

    Attributes:
        prefix: prefix of the paths of modules and tensors, if the model is one of several components.
        blocks: paths of modules whose outputs become ops too.
        adapted: paths of the modules whose forward uses adapted weights.
        attention: whether each attention becomes an op too, so that its sequence can grow in a cache.
    """

    prefix: str = ""
    blocks: Collection[str] = ()
    adapted: Collection[str] = ()
    attention: bool = False


def mark_sites(model: nn.Module, marks: SiteMarks) -> None:
    """Make every site and block of a structural copy call its op, in place.

    Raises:
        CaptureError: a block is not a module of the model.
    """
    prefix, blocks = marks.prefix, marks.blocks
    others = separate_layers(model, [path.removeprefix(prefix) for path in marks.adapted])
    modules = {f"{prefix}{path}": module for path, module in model.named_modules() if module not in others}
    if unknown := sorted({split_output(path)[0] for path in blocks} - modules.keys()):
        raise CaptureError(
            f"the model has no module {unknown[0]!r} to mark as a block",
            nearest=nearest_name(unknown[0], modules),
            next_step="`lorac sites MODEL` prints the blocks",
        )
    sites = []
    for path, module in modules.items():
        if (forward := _site_forward(module, path)) is None:
            continue
        if "_old_forward" in vars(module):  # keep the wrapper of accelerate's hooks on the instance
            module._old_forward = forward
        elif "forward" in vars(module) and path not in marks.adapted:  # a replaced forward may compute something else
            continue
        elif has_plain_forward(module):
            module.forward = forward
        elif calls_super_forward(module):  # a scaled or offset embedding, which keeps its own forward
            module.__class__ = replace_super_forward(module, forward)
        sites.append(path)
    for path in set(marks.adapted).intersection(sites):
        guard_hooks(modules[path], path)
    for path in blocks:
        module = modules[split_output(path)[0]]
        module.forward = _block_forward(module.forward, path)


def _site_forward(module: nn.Module, path: str) -> Forward | None:
    """Return the forward that calls a site's op; None if the module is not a site."""
    if isinstance(module, nn.Linear):
        return lambda input: torch.ops.lorac.linear(input, module.weight, module.bias, path)
    if isinstance(module, nn.Embedding) and module.max_norm is None:  # max_norm writes into the weight
        padding = -1 if module.padding_idx is None else module.padding_idx
        return lambda input: torch.ops.lorac.embedding(input, module.weight, padding, path)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        conv = read_conv_geometry(module)
        stride, pads, dilation = list(conv.stride), list(conv.padding), list(conv.dilation)

        def forward(input: Tensor) -> Tensor:
            x, bias, groups = pad_conv_input(input, conv), module.bias, conv.groups
            result: Tensor = torch.ops.lorac.conv(x, module.weight, bias, stride, pads, dilation, groups, path)
            return result

        return forward
    if is_gpt2_conv1d(module):
        conv1d: Any = module  # GPT-2's: a linear layer that stores its weight as (in, out)
        return lambda x: torch.ops.lorac.linear(x, conv1d.weight.t(), conv1d.bias, path)
    return None


def _block_forward(original: Forward, path: str) -> Forward:
    """Return a block's forward in which the tensor that the path names passes through an op; the output type stays."""

    def forward(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        x = first_tensor((args, kwargs))
        return replace_first_tensor(output, lambda y: torch.ops.lorac.block(x, y, path), split_output(path)[1])

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]  # functions take attributes
    return forward
