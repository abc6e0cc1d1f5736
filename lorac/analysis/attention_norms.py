"""How large the queries and keys of a model are, against the threshold of fast attention.

Hu et al. 2024, arXiv 2406.03136: while no entry of the adapted queries and keys exceeds o(√ln L), L being the length of
the sequence, gradients of LoRA can be approximated in almost linear time; above that, not faster than in quadratic time
(SETH). The scale β of the logits is taken half by the queries and half by the keys.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorac.adapters.factors import iter_changes
from lorac.errors import Unavailable
from lorac.frontend.host import Host
from lorac.frontend.hosts.transformers import TransformersHost
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import merge_weight
from lorac.variants.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR, ABOVE = 0.5, 1.0
"""Ratios from which a head is called near the threshold and above it: a convention, since the theorem is asymptotic."""
_PROJECTIONS = ("q_proj", "k_proj")
"""Names of the projections to queries and to keys."""


@dataclass(frozen=True)
class ProjectionNorms:
    """The largest entries of a head's queries or keys before rotary embedding, times √β, for the same inputs X.

    Attributes:
        total: of X·W'ᵀ, with the bias.
        base: of X·Wᵀ, with the bias.
        delta: of X·(W' − W)ᵀ.
    """

    total: float
    base: float
    delta: float

    @property
    def growth(self) -> float:
        """How many times larger the adapter makes them."""
        return self.total / self.base if self.base else math.inf


@dataclass(frozen=True)
class HeadNorms:
    """The largest entries of one head's queries, keys and values, after rotary embedding.

    Attributes:
        length: L, of the sequence.
        q_max, k_max: of queries and keys, times √β.
        v_max: of values.
        max_logit: of β·Q·Kᵀ over all pairs, masked or not.
        query, key: the parts of base and adapter; None where the module has no ``q_proj`` or ``k_proj``.
    """

    length: int
    q_max: float
    k_max: float
    v_max: float
    max_logit: float
    query: ProjectionNorms | None = None
    key: ProjectionNorms | None = None

    @property
    def threshold(self) -> float:
        """√ln L."""
        return math.sqrt(math.log(self.length))

    @property
    def ratio(self) -> float:
        """The larger of queries and keys over the threshold."""
        return max(self.q_max, self.k_max) / self.threshold if self.length > 1 else math.inf

    @property
    def status(self) -> str:
        """One of "below", "near", from a ratio of 0.5 on, and "above", of more than 1."""
        return "above" if self.ratio > ABOVE else "near" if self.ratio >= NEAR else "below"


def measure_attention(
    model: nn.Module, inputs: Mapping[str, Tensor], adapter: Adapter | None = None
) -> dict[str, tuple[HeadNorms, ...]]:
    """Return the norms of every head in one call of a transformers model, by the path of the attention.

    Args:
        model: only read.
        inputs: arguments of the call.
        adapter: of a method that edits weights, at strength 1; None measures the base.

    Raises:
        Unavailable: no attention of the model goes through transformers' interface.
        CompileError, SiteError, AdapterError: as ``lorac.factors``.
    """
    host = Host.of(model)
    if not isinstance(host, TransformersHost):
        raise _no_interface(model)
    weights, deltas = _merge(model, adapter)
    recorder = _Recorder({id(module): path for path, module in model.named_modules()}, deltas)
    with torch.no_grad(), _recording(host.model, recorder):
        torch.func.functional_call(model, weights, kwargs=dict(inputs))
    if not recorder.found:
        raise _no_interface(model)
    return recorder.found


def measure_projection(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, scale: float) -> ProjectionNorms:
    """Return the norms of one head's projection.

    Args:
        x: inputs (…, in).
        weight, bias: the head's rows of W' (d, in) and of the bias.
        delta: the head's rows of W' − W.
        scale: β.
    """
    total, added = nn.functional.linear(x, weight, bias), x @ delta.t()
    return ProjectionNorms(*(scale**0.5 * float(one.abs().max()) for one in (total, total - added, added)))


class _Recorder:
    """Norms during one call.

    Args:
        paths: id of a module -> its path.
        deltas: path -> W' − W of the adapter.

    Attributes:
        found: path of an attention -> the norms of its heads.
    """

    def __init__(self, paths: Mapping[int, str], deltas: Mapping[str, Tensor]) -> None:
        self._paths, self._deltas = paths, deltas
        self._inputs: dict[str, tuple[Tensor, nn.Linear]] = {}
        self.found: dict[str, tuple[HeadNorms, ...]] = {}

    def record_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input of a projection."""
        if isinstance(module, nn.Linear):
            self._inputs[self._paths[id(module)]] = args[0].double(), module

    def record(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Measure the heads of an attention, (batch, heads, L, d)."""
        path, groups = self._paths[id(module)], q.shape[1] // k.shape[1]
        queries, keys = (
            self._measure_parts(f"{path}.{name}", heads, scale)
            for name, heads in zip(_PROJECTIONS, (q.shape[1], k.shape[1]), strict=True)
        )
        heads = []
        for index in range(q.shape[1]):
            own, read, values = q[:, index].double(), k[:, index // groups].double(), v[:, index // groups]
            heads.append(
                HeadNorms(
                    length=q.shape[2],
                    q_max=scale**0.5 * float(own.abs().max()),
                    k_max=scale**0.5 * float(read.abs().max()),
                    v_max=float(values.abs().max()),
                    max_logit=scale * float((own @ read.mT).abs().max()),
                    query=queries[index],
                    key=keys[index // groups],
                )
            )
        self.found[path] = tuple(heads)

    def _measure_parts(self, path: str, heads: int, scale: float) -> Sequence[ProjectionNorms | None]:
        if path not in self._inputs:
            return [None] * heads
        x, module = self._inputs[path]
        weight = module.weight.double()
        delta = self._deltas.get(path, torch.zeros_like(weight))
        biases = [None] * heads if module.bias is None else module.bias.double().chunk(heads)
        rows = zip(weight.chunk(heads), biases, delta.chunk(heads), strict=True)
        return [measure_projection(x, *own, scale) for own in rows]


@contextlib.contextmanager
def _recording(model: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    """Switch a model to an attention function that records, and back at the end."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, None]:
        given = kwargs.get("scaling")
        recorder.record(module, query, key, value, given if isinstance(given, float) else query.shape[-1] ** -0.5)
        return usual(module, query, key, value, *args, **kwargs)

    before, own = model.config._attn_implementation, f"lorac_norms_{id(recorder)}"  # two threads may measure
    ALL_ATTENTION_FUNCTIONS[own] = attend
    ALL_MASK_ATTENTION_FUNCTIONS[own] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    named = [module for name, module in model.named_modules() if name.endswith(_PROJECTIONS)]
    hooks = [module.register_forward_pre_hook(recorder.record_input) for module in named]
    try:
        model.set_attn_implementation(own)
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        del ALL_ATTENTION_FUNCTIONS[own], ALL_MASK_ATTENTION_FUNCTIONS[own]


def _merge(model: nn.Module, adapter: Adapter | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the merged weights by parameter, and W' − W in float64 by site."""
    if adapter is None:
        return {}, {}
    view, merged, deltas = ModelView.of(model), dict[str, Tensor](), dict[str, Tensor]()
    for path, change in iter_changes(None, adapter, view, torch.float64):
        site = view.sites[path]
        weight = view.base.weight(site).double()
        changed = merge_weight(change, weight)
        merged[str(site.weight)] = site.store(changed).to(site.dtype)
        deltas[path] = changed - weight
        bias = view.base.bias(site)
        if change.e is not None and bias is not None:
            merged[str(site.bias)] = bias + change.e.to(site.dtype)
    return merged, deltas


def _no_interface(model: nn.Module) -> Unavailable:
    return Unavailable(
        f"{type(model).__name__} does not attend through the interface of transformers",
        next_step="give a model of transformers that does, such as a Llama",
    )
