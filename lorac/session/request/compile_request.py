"""``CompileRequest``: the arguments of compile(), apart from the model."""

from dataclasses import dataclass

import torch

from lorac.argument_types import check_type
from lorac.ir.calls.call import convert_to_tensors
from lorac.ir.slots.choice import ChoiceSpec
from lorac.ir.slots.required_slots import Reserve
from lorac.session.request.placement import parse_device
from lorac.session.request.precision import parse_dtype
from lorac.session.request.sources import NamedSource, read_sources
from lorac.session.targets import find_backend, parse_options
from lorac.target.backend import Backend, TargetOptions


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """The arguments of compile(), checked and converted. Nothing is computed yet.

    Attributes:
        sources: the adapters' names, if given, and sources.
        mode, active, reserve, dynamic_shapes: as given.
        example_inputs: as given, arrays as tensors.
        dtype, device: the requested dtype and device; None: the model's.
    """

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

    @classmethod
    def read(  # noqa: PLR0913, PLR0917  (the arguments of the public interface)
        cls,
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
    ) -> "CompileRequest":
        """Check the arguments of compile().

        Raises:
            LoracError: a subclass, see ``lorac.errors``.
        """
        if reserve is not None:
            check_type(reserve, Reserve, "reserve=", next_step="give lorac.Reserve(targets=..., rank=...)")
        parsed_device = parse_device(device)
        backend = find_backend(target)
        return cls(
            sources=tuple(read_sources(adapters)),
            backend=backend,
            options=parse_options(target, backend, options),
            mode=mode,
            active=active,
            reserve=reserve,
            example_inputs=convert_to_tensors(example_inputs),
            dynamic_shapes=dynamic_shapes,
            dtype=parse_dtype(dtype),
            device=parsed_device,
        )
