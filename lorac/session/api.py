"""``compile``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lorac.argument_types import check_type
from lorac.frontend.call_binding import convert_to_tensors
from lorac.frontend.components import Components
from lorac.frontend.parametrized_weights import materialize_weights
from lorac.frontend.quantised_weights import dequantise_weights
from lorac.ir.slots.choice import ChoiceSpec
from lorac.ir.slots.planning import Reserve
from lorac.session.compilation import Compilation, CompileRequest
from lorac.session.compiled import Compiled
from lorac.session.host_model import HostModel
from lorac.session.placement import resolve_placement
from lorac.session.precision import cast_model, parse_dtype
from lorac.session.session import Session
from lorac.session.sources import AdapterSource, parse_device, read_model, read_sources
from lorac.session.targets import find_backend

Device = str | torch.device


def compile(  # noqa: PLR0913, PLR0917  (the public interface)
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Mapping[str, AdapterSource] | Iterable[AdapterSource] = (),
    target: str = "eager",
    example_inputs: object = None,
    mode: str = "auto",
    active: ChoiceSpec = "auto",
    reserve: Reserve | None = None,
    dynamic_shapes: object = None,
    dtype: torch.dtype | str | None = None,
    device: Device | None = None,
    **options: object,
) -> Compiled:
    """Compile a model and its adapters for a target.

    Args:
        model: an nn.Module; left as it was: weights, flags, hooks, mode, random state. Or several by name: sites begin
            with a component's name, and ``compiled[name](...)`` calls it. A PeftModel is its base and its adapters.
        adapters: paths, Adapters, fresh Variants (to train) or configurations of PEFT's, by name or as a list; those
            that a PeftModel brings come first, but for names given here.
        target: ``"eager"``, ``"onnxruntime"``, ``"tensorrt"`` or any other of ``lorac.session.targets.targets()``.
        example_inputs: tuple or dict of tensors or NumPy arrays, or one of these alone; of several models one tuple or
            dict by name. Default: made from the model's main input and config.
        mode: ``"live"``, ``"fused"``, ``"baked"`` or ``"auto"``.
        active: what ``swap`` takes; ``"auto"``: the only adapter at strength 1, or None if there are several.
        reserve: room for adapters added later; default: the given adapters' sites.
        dynamic_shapes: as torch.export's, of several models one by name; default: batch, and length for text. A size
            that the model's trace fixes nevertheless is named by a warning, and a call with another one refused.
        dtype: default: the model's; also by its name ("float16"). Floating-point example inputs, and inputs of calls
            in the model's own dtype, are cast with the model. A target that lacks the dtype computes and answers in
            another one, and a warning and ``explain()`` say so.
        device: where it runs; default: where the model is. Programs are emitted from a model on the CPU, whatever they
            run on: one that is elsewhere is copied for that. A call answers where its inputs are.
        **options: fields of the target's options.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    if reserve is not None:
        check_type(reserve, Reserve, "reserve=", next_step="give lorac.Reserve(targets=..., rank=...)")
    given = read_model(model)
    host = Components(given.model) if isinstance(given.model, Mapping) else given.model
    place = parse_device(device)
    backend = find_backend(target)
    told, home = resolve_placement(backend, backend.told(options), place, host)
    dialect = backend.dialect_for(told)
    wanted = parse_dtype(dtype)
    plain = materialize_weights(host)
    if dialect.emits:  # an emitted program has no kernels of other libraries
        plain = dequantise_weights(plain)
    moved, precision = cast_model(plain, dialect, wanted, home)
    lasting = Session(HostModel(moved, given.model, {"dtype": wanted, "device": place}))
    own = read_sources(adapters)
    brought_along = [named for named in given.adapters if named[0] not in dict(own)]
    examples = convert_to_tensors(example_inputs)
    asked = CompileRequest(
        mode=mode,
        active=given.active if active == "auto" and not own else active,
        reserve=reserve,
        example_inputs=examples if wanted is None else precision.fit(examples),
        dynamic_shapes=dynamic_shapes,
        options=told,
    )
    precision.tell(target)
    return Compilation(lasting, backend, compile, precision).run([*brought_along, *own], asked)
