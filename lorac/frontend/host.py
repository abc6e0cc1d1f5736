"""``Host``: a model, and the properties of it that depend on its library.

A library has a class in a module of ``lorac.frontend.hosts``, or a class that an installed package declares as an entry
point of the group ``lorac.hosts``. Models of unknown libraries have a ``PlainHost``.
"""

from __future__ import annotations

import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lorac.discovery import import_modules, list_entry_points
from lorac.errors import ExampleInputsNeeded, warn
from lorac.frontend import hosts
from lorac.frontend.copying import copy_structure
from lorac.ir.calls.call import Call, Inputs
from lorac.ir.calls.multimodal_positions import MultimodalPositions

GROUP = "lorac.hosts"
"""Entry point group of installed packages: each entry point is a subclass of ``Host``."""


class Host(ABC):
    """A model of some library. ``Host.of(model)`` chooses the class; no other code depends on a model's library.

    A subclass overrides the methods that differ for its library.

    Args:
        model: the model; only ``configure``, and methods documented to do so, change it.
    """

    named_sizes: ClassVar[tuple[bool, ...]] = (True, False)
    """For each tracing attempt, whether varying sizes have names; torch may narrow or fix sizes without names."""
    free_sizes: ClassVar[frozenset[str]] = frozenset()
    """Names of the sizes in ``axes`` that a model restricts, so that torch must be allowed to narrow them."""
    row_numbers: ClassVar[tuple[str, ...]] = ()
    """Arguments that take one number per row, or one number for all rows."""
    has_sequences: ClassVar[bool] = False
    """Whether inputs have axes of tokens, even if a model of another library contains this model."""
    by_name: ClassVar[bool] = False
    """Whether ``trace`` takes inputs only by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Return whether a model is of this library, without importing the library."""

    @staticmethod
    def of(model: nn.Module) -> Host:
        """Return the host of a model."""
        return next((kind for kind in _list_libraries() if kind.recognises(model)), PlainHost)(model)

    def find_sequence_host(self) -> Host | None:
        """Return the host of the model, or of the first module in it, whose inputs have axes of tokens."""
        if self.has_sequences:
            return self
        libraries = [library for library in _list_libraries() if library.has_sequences]
        inside = ((library, module) for module in self.model.modules() for library in libraries)
        return next((library(module) for library, module in inside if library.recognises(module)), None)

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter; None for a model without parameters."""
        return next((parameter.device for parameter in self.model.parameters()), None)

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of forward by name."""
        return inspect.signature(self.model.forward).parameters

    def make_wave(self, shape: Sequence[int]) -> Tensor:
        """Make values from -1 to 1 without a random generator, in the model's dtype and on its device."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        count = torch.Size(shape).numel()
        return (torch.arange(count, device=self.device).remainder(255) / 127.5 - 1).reshape(shape).to(dtype)

    def copy(self, *, share_buffers: bool = False) -> Self:
        """Return the host of a structural copy of the model (``copy_structure``)."""
        return type(self)(copy_structure(self.model, share_buffers=share_buffers))

    def list_row_numbers(self, call: Call) -> list[object]:
        """Return the arguments of a call that are one number per row, or one number for all rows."""
        named = {**dict(zip(self.parameters, call.args, strict=False)), **call.kwargs} if self.row_numbers else {}
        return [named[name] for name in self.row_numbers if name in named]

    @abstractmethod
    def example_inputs(self) -> dict[str, Any]:
        """Make example inputs by name.

        Raises:
            ExampleInputsNeeded: the inputs cannot be derived from the model.
        """

    def require_inputs(self, example: str) -> ExampleInputsNeeded:
        """Return the error for a model whose example inputs cannot be made; it shows code that makes them."""
        return ExampleInputsNeeded(
            f"example inputs cannot be made for {type(self.model).__name__}; "
            f"its forward takes ({', '.join(self.parameters)})",
            next_step=self.advise_names(()) or f"pass example_inputs={example}, batch and lengths of 2 or more",
        )

    def advise_names(self, given: Collection[object]) -> str | None:
        """Return advice if inputs are passed to forward's ``*args``; else None.

        Args:
            given: names or numbers of the inputs.
        """
        names = self.list_positional_arguments()
        star = next((name for name, one in self.parameters.items() if one.kind is one.VAR_POSITIONAL), None)
        if star is None or (names and star not in given and len(given) <= len(names)):
            return None
        return f"inputs of a program have names, *{star} have none: compile a module around it whose forward names them"

    def bind(self, inputs: object = None) -> dict[str, Any]:
        """Return inputs by the names of forward's arguments; inputs that are None are dropped.

        Args:
            inputs: by name or in order; None makes example inputs.

        Raises:
            TypeError: forward takes no such arguments.
            ExampleInputsNeeded: as ``example_inputs`` does.
        """
        named = self.example_inputs() if inputs is None else self.bind_values(inputs)
        return {name: value for name, value in named.items() if value is not None}

    def bind_values(self, values: Any) -> dict[str, Any]:
        """Return values by name; values in a sequence are bound to forward's arguments in order.

        Raises:
            TypeError: forward takes no such arguments.
        """
        return dict(
            values if isinstance(values, Mapping) else inspect.signature(self.model.forward).bind(*values).arguments
        )

    def list_positional_arguments(self) -> tuple[str, ...]:
        """Return the names of forward's arguments in the order of a positional call."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(name for name, parameter in self.parameters.items() if parameter.kind in positional)

    def defaults(self) -> dict[str, object]:
        """Return forward's arguments that are not tensors, with their values in a capture."""
        return {n: p.default for n, p in self.parameters.items() if isinstance(p.default, bool | int | float | str)}

    def axes(self, name: str, value: Tensor, inputs: Inputs) -> dict[int, str]:
        """Return the varying axes of an input, besides the rows, with the names of their sizes.

        Args:
            name, value: the input, or a tensor in it.
            inputs: all inputs.
        """
        return {}

    def count_rows(self, inputs: Inputs) -> int | None:
        """Return the number of rows of an example call; None: the first size of its first tensor."""
        return None

    @property
    def longest(self) -> int | None:
        """The longest sequence of tokens; None: no limit."""
        return None

    @property
    def generates(self) -> bool:
        """Whether the model is a language model that generates token by token."""
        return False

    def find_number_inputs(self, inputs: Inputs) -> dict[str, object]:
        """Return name -> numbers, for input tensors that the model reads as numbers."""
        return {}

    def find_positions(self) -> MultimodalPositions | None:
        """Return the object that computes the positions of text with images; None if forward takes no positions."""
        return None

    def trace(self, inputs: Any, shapes: Any) -> ExportedProgram:
        """Run torch.export on the model, which must be a copy, since it may be changed.

        Args:
            inputs: by name or in order.
            shapes: dynamic shapes of the inputs.
        """
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        return torch.export.export(self.model, args, kwargs, dynamic_shapes=shapes)

    def configure(self, fields: Mapping[str, object]) -> Self:
        """Set fields in all configurations of a copy that have them; return the host.

        Args:
            fields: name -> value.
        """
        return self

    def encoders(self) -> list[nn.Module]:
        """Return the encoder if the model's ``generate`` calls it separately; else an empty list."""
        return []

    def record_untied_weights(self) -> None:  # noqa: B027  (other libraries record nothing)
        """Update a copy's configuration to its weights, some of which were untied."""

    def forget_quantisation(self) -> None:  # noqa: B027  (other libraries record nothing)
        """Remove the quantisation record of a copy whose weights were dequantised."""

    def checkpoint_changes(self) -> list[Any] | None:
        """Return the library's renamings and conversions of tensors in checkpoints; None if it has none."""
        return None

    def decoder(self) -> nn.Module:
        """Return the model as a pipeline calls it; for an autoencoder, a copy whose forward decodes."""
        return self.model


class PlainHost(Host):
    """A model of an unknown library."""

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return True

    def example_inputs(self) -> dict[str, Any]:
        raise self.require_inputs(describe_tensors(self.parameters))


def describe_tensors(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return code for a dict with a tensor for each argument that forward requires."""
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    numbers = [n for n, p in parameters.items() if re.search(r"\b(int|float)\b", str(p.annotation))]
    values = (
        f"{n!r}: torch.tensor(1.0)" if n in numbers else f"{n!r}: torch.randn(2, ...)" for n in needed or parameters
    )
    return f"{{{', '.join(values)}}}, with the shapes that the model takes"


def _list_libraries() -> tuple[type[Host], ...]:
    """Return the classes of installed packages, then lorac's, so that a package may override a library of lorac's."""
    return _load_libraries(tuple(list_entry_points(GROUP).values()))


@functools.cache
def _load_libraries(installed: tuple[EntryPoint, ...]) -> tuple[type[Host], ...]:
    """Import the classes; skip a class of another package that cannot be imported, with a warning."""
    found: list[type[Host]] = []
    for entry_point in installed:
        try:
            offered = entry_point.load()
            if not issubclass(offered, Host):
                raise TypeError(f"{offered.__name__} is not a subclass of Host")
            found.append(offered)
        except Exception as error:  # code of another package may raise any error on import
            warn(f"the host '{entry_point.name}' of another package is left out: {type(error).__name__}: {error}")
    return (*found, *(module.HOST for module in import_modules(hosts)))
