"""``CompileRequest``: what compile() was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorac.argument_types import check_type
from lorac.frontend.call_binding import convert_to_tensors
from lorac.frontend.components import Components
from lorac.ir.slots.choice import ChoiceSpec
from lorac.ir.slots.planning import Reserve
from lorac.session.request.placement import parse_device, resolve_placement
from lorac.session.request.precision import parse_dtype
from lorac.session.request.sources import NamedSource, read_model, read_sources
from lorac.session.targets import find_backend
from lorac.target.backend import Backend, TargetOptions

ModelArgument = nn.Module | Mapping[str, nn.Module]


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """The arguments of compile(), checked and converted. Nothing is computed yet.

    Attributes:
        given: the model or models as the caller gave them; of a PeftModel its base.
        model: the same as one module.
        sources: the adapters' names, if given, and sources.
        backend: the target's backend.
        options: the target's options.
        mode: as given.
        active: as given; of a PeftModel what was active in it.
        reserve: as given.
        example_inputs: as given, arrays as tensors.
        dynamic_shapes: as given.
        dtype: the dtype asked for; None: the model's.
        device: the device asked for; None: the model's.
        model_device: the device to which the model is copied before it is compiled; None: it stays.
    """

    given: ModelArgument
    model: nn.Module
    sources: tuple[NamedSource, ...]
    backend: Backend[TargetOptions]
    options: TargetOptions
    mode: str
    active: ChoiceSpec
    reserve: Reserve | None
    example_inputs: object
    dynamic_shapes: object
    dtype: torch.dtype | None
    device: torch.device | None
    model_device: torch.device | None

    @classmethod
    def read(  # noqa: PLR0913, PLR0917  (the arguments of the public interface)
        cls,
        model: object,
        adapters: object,
        target: str,
        example_inputs: object = None,
        mode: str = "auto",
        active: ChoiceSpec = "auto",
        reserve: Reserve | None = None,
        dynamic_shapes: object = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: object,
    ) -> CompileRequest:
        """Check the arguments of compile().

        Raises:
            LoracError: a subclass, see ``lorac.errors``.
        """
        if reserve is not None:
            check_type(reserve, Reserve, "reserve=", next_step="give lorac.Reserve(targets=..., rank=...)")
        source = read_model(model)
        module = Components(source.model) if isinstance(source.model, Mapping) else source.model
        parsed_device = parse_device(device)
        backend = find_backend(target)
        target_options, model_device = resolve_placement(backend, backend.parse_options(options), parsed_device, module)
        parsed_dtype = parse_dtype(dtype)
        named = read_sources(adapters)
        names = {name for name, _ in named}
        return cls(
            given=source.model,
            model=module,
            sources=(*(of_model for of_model in source.adapters if of_model[0] not in names), *named),
            backend=backend,
            options=target_options,
            mode=mode,
            active=source.active if active == "auto" and not named else active,
            reserve=reserve,
            example_inputs=convert_to_tensors(example_inputs),
            dynamic_shapes=dynamic_shapes,
            dtype=parsed_dtype,
            device=parsed_device,
            model_device=model_device,
        )
