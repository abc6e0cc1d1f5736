"""Capture with a cache: each recurrence of a transformers model becomes one op.

Models without attention mix tokens by functions in their files: chunked forms, whose trace is valid for one length
only. In a traced copy, the functions of ``MIXERS`` replace them: they express the model's terms by
``lorac.ir.graph.ops``. A short convolution needs none: it is traced unchanged.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-6
"""The epsilon that the delta rules add to the squared norms of queries and keys."""


def _apply_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    """Apply the gated delta rule, with a decay per head (Qwen3-Next) or per feature of keys (Kimi)."""
    q, k, v = (x.to(torch.float32) for x in (query, key, value))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (q, k))
    shared = v.shape[2] // k.shape[2]
    q, k = ((x if shared == 1 else x.repeat_interleave(shared, 2)) for x in (q * q.shape[-1] ** -0.5, k))
    decay = g.to(torch.float32)[..., None]
    y = _recur(q, k, v, decay if decay.dim() > v.dim() else decay[..., None], beta=beta.to(torch.float32))
    return y.to(query.dtype), None


def _scan_heads(  # noqa: PLR0913  (as transformers calls it)
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: object,
) -> Tensor:
    """Scan as Mamba-2 does: each head has a state, and the heads of a group share B and C."""
    x = hidden_states.to(torch.float32)
    step = _discretise(dt, dt_bias, softplus=dt_softplus).clamp(*dt_limit)
    shared = x.shape[2] // B.shape[2]
    k, q = (one.to(torch.float32).repeat_interleave(shared, 2) for one in (B, C))
    y = _recur(q, k, x * step[..., None], (A * step)[..., None, None])
    return y if D is None else y + x * D[:, None]


def _scan_channels(  # noqa: PLR0913  (as transformers calls it)
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: object,
) -> Tensor:
    """Scan as Mamba does: each channel of (batch, channels, length) has a state, with a decay for each number in it."""
    x, step = (one.transpose(1, 2)[:, :, None].to(torch.float32) for one in (hidden_states, dt))
    step = _discretise(step, delta_bias, softplus=delta_softplus)
    k, q = (one.transpose(1, 2)[:, :, None].to(torch.float32) for one in (B, C))
    y = _recur(q, k, x * step, step[:, :, :, None], rate=A.t()[None])
    y = (y if D is None else y + x * D)[:, :, 0].transpose(1, 2)
    return y if z is None else y * F.silu(z)


def _scan_gates(hidden_states: Tensor, recurrent_gate: Tensor, **_: object) -> tuple[Tensor, None]:
    """Scan as an RG-LRU does; the initial state is zero and needs no reset."""
    v = hidden_states.to(torch.float32)[:, :, None]
    ones = torch.ones_like(v[..., :1])
    y = _recur(ones, ones, v, recurrent_gate.to(torch.float32).log()[:, :, None, None])
    return y[:, :, 0].to(hidden_states.dtype), None


def _discretise(step: Tensor, bias: Tensor | None, *, softplus: bool) -> Tensor:
    step = step if bias is None else step + bias
    return (F.softplus(step) if softplus else step).to(torch.float32)


def _recur(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    y: Tensor = torch.ops.lorac.recurrence(q, k, v, decay, rate, beta, None)[0]
    return y


MIXERS: dict[str, Callable[..., object]] = {
    "apply_mask_to_padding_states": lambda hidden_states, attention_mask: hidden_states,  # a program has no padding
    "torch_chunk_gated_delta_rule": _apply_delta_rule,  # Qwen3-Next, Qwen3.5 and OLMo hybrid
    "chunk_kimi_delta_attention": _apply_delta_rule,  # Kimi linear
    "mamba2_chunk_scan": _scan_heads,  # Bamba, Nemotron-H, Falcon-H1, Granite hybrid, Mamba-2
    "mamba_selective_scan": _scan_channels,  # Jamba, Mamba, Falcon-Mamba
    "_rnn_scan": _scan_gates,  # RecurrentGemma
}
"""Function or method that a mixer of transformers calls -> its replacement, which uses the op."""


def bind_mixers(model: nn.Module) -> None:
    """Make the mixers of a copy call the functions of ``MIXERS``; transformers itself is not changed."""
    for module in model.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        if "forward" in vars(module) or not type(module).__module__.startswith("transformers."):
            continue
        known = {name: MIXERS[name] for name in forward.__code__.co_names if name in MIXERS}
        for name in [name for name in known if name not in forward.__globals__]:
            setattr(module, name, known[name])
        if not known.keys().isdisjoint(forward.__globals__):
            bound = types.FunctionType(forward.__code__, {**forward.__globals__, **known}, closure=forward.__closure__)
            bound.__defaults__, bound.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
            module.forward = types.MethodType(bound, module)
