"""TRL's fused head, inside a call of the compiled model.

TRL's trainers assign another ``forward`` to their model. With ``fused_lm_head=True``, that forward calls the model's
body, and multiplies by the head's weight chunk by chunk. On a compiled model it would bypass the call, and so the
adapters of layers that are recomputed.
"""

import functools
import inspect
import types
from typing import Any

import torch

from lorac.errors import Unavailable
from lorac.ir.algebra.changes import merge_weight
from lorac.ir.sites.site import factor_dtype
from lorac.variants.adapter import Adapter

_NO_CHANGE = 1e-5
"""The largest ‖W' − W‖ / ‖W‖ that counts as rounding, for an adapter that starts at the base, such as PiSSA's."""


def install_fused_head(compiled: Any, forward: Any) -> bool:
    """Install TRL's ``forward`` on a compiled model's host; return False for any other function.

    Args:
        forward: the assigned function. TRL's function has the name and signature of the original.

    Raises:
        Unavailable: the trainer loaded the base as its reference model, and an adapter does not start at the base.
    """
    fused: Any = getattr(forward, "__func__", None)
    code = getattr(fused, "__code__", None)
    if not (isinstance(code, types.CodeType) and "fused_lm_head" in code.co_varnames):
        return False
    _refuse_base_as_reference(compiled)
    host = compiled.host
    plain = host.forward

    @functools.wraps(plain)
    def switched(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        head = host.get_output_embeddings()
        paths = [path for path, module in host.named_modules() if module is head and path in compiled.plans]
        adapted = next(filter(None, map(compiled.engine.adapted_weight, paths)), None)
        adapted_host = host if adapted is None else _HostWithHead(host, *adapted)
        return fused(adapted_host, *args, fused_lm_head=True, **kwargs)

    host.forward = switched
    return True


class _HostWithHead:
    """A host whose head has another weight and bias; everything else is the host's own."""

    def __init__(self, host: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._host, self._head = host, types.SimpleNamespace(weight=weight, bias=bias)

    def get_output_embeddings(self) -> types.SimpleNamespace:
        return self._head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def _refuse_base_as_reference(compiled: Any) -> None:
    """Raise ``Unavailable`` where a TRL trainer's reference model is the base, and the training starts elsewhere.

    ``__init__`` of TRL's trainers loads the model's folder again as the reference, unless the model is PEFT's. A model
    can learn this only from that function's frame.
    """
    frame = inspect.currentframe()
    while frame is not None and getattr(frame.f_locals.get("self"), "__dict__", {}).get("ref_model") is None:
        frame = frame.f_back
    if frame is None or frame.f_locals.get("ref_model") is not None:
        return
    preparer, adapters = compiled.session.preparer, compiled.adapters
    moved = next(
        (name for name, _ in compiled.choice if name in adapters and _moves_base(preparer, adapters[name])), None
    )
    if moved is not None:
        trainer = type(frame.f_locals["self"])
        given = "ref_model" in inspect.signature(trainer).parameters
        raise Unavailable(
            f"{trainer.__name__} loads the base as its reference, but adapter '{moved}' already changes it",
            next_step="give it ref_model=lorac.compile(model, dict(compiled.adapters)).eval()"
            if given
            else "save the base with the adapter merged into it (lorac.merge_into), and train a new adapter on that",
        )


@torch.no_grad()
def _moves_base(preparer: Any, adapter: Adapter) -> bool:
    """Return whether an adapter changes the model; a branch counts as trained if it was read from a file."""
    prepared = preparer.prepare(adapter)
    for path, change in prepared.changes.items():
        weight = preparer.base.weight(preparer.sites[path])
        weight = weight.to(factor_dtype(weight.dtype))
        moved = torch.linalg.vector_norm(merge_weight(change, weight) - weight)
        if moved > _NO_CHANGE * torch.linalg.vector_norm(weight) or (change.e is not None and bool(change.e.any())):
            return True
    return bool(prepared.branches) and "format" in adapter.provenance
