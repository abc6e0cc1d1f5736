"""``compile``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lorac.compiler.compilation import Asked, Compilation
from lorac.compiler.precision import brought, dtype_named
from lorac.compiler.services import Lasting, Source
from lorac.compiler.targets import backend_of
from lorac.ir.host.components import Components
from lorac.ir.host.computed import with_plain_weights
from lorac.ir.slots.choice import Spec
from lorac.ir.slots.planning import Reserve
from lorac.runtime.compiled import Compiled
from lorac.runtime.host import Host
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Device = str | torch.device


def compile(  # noqa: PLR0913, PLR0917  (the public interface)
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Mapping[str, Source] | Iterable[Source] = (),
    target: str = "eager",
    example_inputs: object = None,
    mode: str = "auto",
    active: Spec = "auto",
    reserve: Reserve | None = None,
    dynamic_shapes: object = None,
    dtype: torch.dtype | str | None = None,
    device: Device | None = None,
    **options: object,
) -> Compiled:
    """Compile a model and its adapters for a target.

    Args:
        model: an nn.Module; left as it was: weights, flags, hooks, mode, random state. Or several by name: sites begin
            with a component's name, and ``compiled[name](...)`` calls it.
        adapters: paths, Adapters, or fresh Variants (to train), by name or as a list.
        target: ``"eager"``, ``"onnxruntime"`` or any other of ``lorac.compiler.targets.targets()``.
        example_inputs: tuple or dict, of several models one by name; default: made from the model's main input and
            config.
        mode: ``"live"``, ``"fused"``, ``"baked"`` or ``"auto"``.
        active: what ``swap`` takes; ``"auto"``: the only adapter at strength 1, or None if there are several.
        reserve: room for adapters added later; default: the given adapters' sites.
        dynamic_shapes: as torch.export's, of several models one by name; default: batch, and length for text. A size
            that the model's trace fixes nevertheless is named by a warning, and a call with another one refused.
        dtype, device: default: the model's; a dtype also by its name ("float16"). Floating-point example inputs, and
            inputs of calls in the model's own dtype, are cast with the model. A target that lacks the dtype computes
            and answers in another one, and a warning and ``explain()`` say so.
        **options: fields of the target's options.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    host = Components(model) if isinstance(model, Mapping) else model
    backend = backend_of(target)
    told = backend.told(options)
    wanted = dtype_named(dtype)
    moved, precision = brought(with_plain_weights(host), backend.dialect, wanted, device)
    lasting = Lasting(Host(moved, model, {"dtype": wanted, "device": device}))
    asked = Asked(
        mode=mode,
        active=active,
        reserve=reserve,
        example_inputs=example_inputs if wanted is None else precision.fit(example_inputs),
        dynamic_shapes=dynamic_shapes,
        options=told,
    )
    precision.tell(target)
    return Compilation(lasting, backend, compile, precision).run(_named(adapters), asked)


def _named(adapters: Mapping[str, Source] | Iterable[Source]) -> list[tuple[str | None, Source]]:
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, str | Path | Adapter | Variant):
        return [(None, adapters)]
    return [(None, source) for source in adapters]
