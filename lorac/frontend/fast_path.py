"""torch's transformer layers, which in evaluation call a fused kernel that bypasses their inner layers.

On this path an encoder drops padding at the end of rows and writes zeros there; and a float mask hides every value that
is not 0, though the Python code adds it. Here the Python code gets the same meaning, because an adapter that adds
nothing must not change the result.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorac.ir.traces.modes import FunctionMode

T = TypeVar("T")
FUSED_LAYERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_FUSED_DEVICES = ("cpu", "cuda", "xpu")


class NoFastPath(FunctionMode):
    """A mode without effect; torch does not use fused kernels while a mode is active, in this thread only."""

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def disable_fast_path(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which torch calls the layers inside a model's transformer layers."""
    fuses = any(isinstance(module, FUSED_LAYERS) for module in model.modules())
    return NoFastPath() if fuses else nullcontext()


def find_unfused_forward(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward without the fast path, but with the fast path's meaning of masks."""
    own: Any = type(module).forward
    run: Any = {nn.TransformerEncoder.forward: _run_encoder, nn.TransformerEncoderLayer.forward: _run_layer}.get(own)
    return module.forward if run is None or "forward" in vars(module) else functools.partial(run, module)


def _run_encoder(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = None,
) -> Tensor:
    padding = src_key_padding_mask
    nests = encoder.use_nested_tensor and padding is not None and mask is None
    if not nests or not _is_fused(encoder.layers[0], src):
        return nn.TransformerEncoder.forward(encoder, src, mask, padding, is_causal)
    padding = padding if padding.dtype is torch.bool else padding != 0
    dropped = padding.unsqueeze(-1)
    if encoder.mask_check:  # otherwise the caller guarantees that padding follows the tokens in every row
        dropped = dropped & ~(padding[:, :-1] & ~padding[:, 1:]).any()
    for layer in encoder.layers:
        src = layer(src, src_key_padding_mask=padding)
    src = src.masked_fill(dropped, 0)
    return src if encoder.norm is None else encoder.norm(src)


def _run_layer(
    layer: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Tensor:
    masks = [src_mask, src_key_padding_mask]
    if any(mask is not None and mask.is_floating_point() for mask in masks) and _is_fused(layer, src):
        masks = [mask if mask is None or mask.dtype is torch.bool else mask != 0 for mask in masks]
    return nn.TransformerEncoderLayer.forward(layer, src, masks[0], masks[1], is_causal)


def _is_fused(layer: Any, src: Tensor) -> bool:
    """Return whether the host, whose weights record no gradients, calls the kernel for a layer."""
    attention, hooks = layer.self_attn, ("_forward_hooks", "_forward_pre_hooks")
    return (
        torch.backends.mha.get_fastpath_enabled()
        and not (layer.training or torch.is_autocast_enabled() or src.is_nested)
        and (src.dim(), src.device.type in _FUSED_DEVICES) == (3, True)
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and not attention.num_heads % 2
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and not any(vars(module)[name] for module in layer.modules() for name in hooks)
    )
