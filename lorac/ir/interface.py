"""How a captured program is called: the host's inputs by name, and its own output type back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lorac.errors import ArtifactError, ChoiceError, InputMismatch, nearest_name, short
from lorac.frontend.call_binding import list_fixed_arguments, list_positional_arguments
from lorac.ir.fixed_arguments import CAPTURE_CONFIG, OUTPUT_SWITCHES, to_json_value
from lorac.ir.graph.graph import Graph
from lorac.ir.multimodal_positions import POSITION_IDS, MultimodalPositions
from lorac.ir.output_structure import OutputStructure, name_outputs, structure_from_json, structure_to_json
from lorac.ir.row_layout import RowLayout
from lorac.ir.sizes import SizeConstraints, flatten_argument

aten = torch.ops.aten
_RESHAPING = frozenset(
    {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten._to_copy.default, aten.to.dtype}
    | {aten.clone.default, aten.alias.default, aten.expand.default}
)
"""Ops that leave ids what they are."""
ADAPTERS_ARGUMENT = "adapters"
"""The argument of a call that is no input: which adapters it is to run with."""
RETURN_DICT = "return_dict"
"""The argument by which models of transformers and diffusers are asked for a tuple: only the output's kind changes."""

_Runs = Callable[[dict[str, Any]], list[Any]]
"""A program: its outputs in order, for inputs by name."""
_NAMES = ("inputs", "arguments", "outputs", "extra", "told", "notes", "unused")


@dataclass(frozen=True, eq=False)
class Interface:
    """Inputs and outputs of the host as an emitted program has them.

    Attributes:
        inputs: names of the program's inputs, in order.
        arguments: names of the host's arguments, in the order of positional calls.
        structure: what the host answers around the program's tensors; None where only names are known.
        outputs: names of the program's outputs, the host's own first: the model's names for them.
        extra: names of the extra outputs behind them.
        fixed: arguments that are constants of the program, and what they were when the host was captured.
        told: those of them that every call has to give: left out, they would mean something else to the host.
        below: of the inputs that are ids of an embedding, how many there are.
        spelled: arguments of the host whose inputs are called otherwise -> what those are called.
        sizes: which sizes the inputs may have.
        derived: inputs that calls may leave out -> how the model makes them of the others.
        positions: what does so; None of a program that was loaded.
        rows: how a call of another number of rows is one of several; None where it is none.
        checks: of the extra outputs, those that have to be true -> the line of the model that wants them so.
        notes: what whoever calls the program should know about it, each in a sentence.
        types: input or output -> its dtype and sizes, those that vary by name: ``int64[batch, length]``.
        unused: paths of sites that were to have slots, and that no output depends on.
    """

    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    structure: OutputStructure | None = None
    extra: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    below: Mapping[str, int] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    sizes: SizeConstraints = field(default_factory=SizeConstraints)
    derived: Mapping[str, str] = field(default_factory=dict)
    positions: MultimodalPositions | None = None
    rows: RowLayout | None = None
    checks: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], program: _Runs) -> tuple[Any, dict[str, Any]]:
        """The host's output object of one call and the extra outputs by name, in as many parts as its rows need.

        Args:
            args, kwargs: of the call.
            program: the outputs in order, for inputs by name.

        Raises:
            ChoiceError, InputMismatch: as ``bind``; then nothing was run.
        """
        named = self._named(args, kwargs)
        try:
            given = self._bound(named)
        except InputMismatch:
            if self.rows is None or self.structure is None or self.rows.total(named) in (0, self.rows.count):
                raise
            return self._run_in_parts(self.rows, self.structure, named, kwargs, program)
        return self.answer(program(given), kwargs)

    def _run_in_parts(
        self,
        rows: RowLayout,
        structure: OutputStructure,
        named: Mapping[str, Any],
        asked: Mapping[str, Any],
        program: _Runs,
    ) -> tuple[Any, dict[str, Any]]:
        total, parts = rows.total(named), [self._bound(part) for part in rows.split(named)]
        answers = [self._checked(program(given)) for given in parts]
        own = len(answers[0]) - len(self._told)
        output = structure.joined([values[:own] for values in answers], rows, total)
        extra = [rows.whole(values, total) for values in zip(*(values[own:] for values in answers), strict=True)]
        return _as_asked(output, asked), dict(zip(self._told, extra, strict=True))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Program input -> value, for one call of as many rows as the program takes.

        Raises:
            ChoiceError: an argument the program was not captured with, one given twice, a missing one, or ids that an
                embedding does not have (a target may take a negative one for one counted from the end).
            InputMismatch: an input has a size, or an argument a value, that the program was not captured for.
        """
        return self._bound(self._named(args, kwargs))

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a call gives, as the program calls it; what is None is left out."""
        positional = dict(zip(self.arguments, args, strict=False))
        twice = sorted(positional.keys() & kwargs.keys())
        if twice or len(args) > len(self.arguments):
            what = f"'{twice[0]}' is given twice" if twice else f"{len(args)} positional arguments are too many"
            raise ChoiceError(what, next_step=f"the host takes {', '.join(self.arguments)}")
        named = {**positional, **kwargs}.items()
        given = {self.spelled.get(name, name): value for name, value in named if value is not None}
        known = {*self.inputs, *self.fixed}
        return {own: value for name in given for own, value in self._parts_of(name, given[name], known)}

    def _parts_of(self, name: str, value: Any, known: Collection[str]) -> list[tuple[str, Any]]:
        """An argument as inputs: one that holds several tensors is as many, called by their places.

        Raises:
            InputMismatch: it holds other ones than the program was captured with.
        """
        inputs = [own for own in self.inputs if own.startswith(f"{name}_")]
        if name in known or not inputs or not isinstance(value, Mapping | list | tuple):
            return [(name, value)]
        parts = {own: part for own, part in flatten_argument(value, name) if part is not None}
        if parts.keys() != {*inputs}:
            raise InputMismatch(
                f"argument '{name}' holds {len(parts)} tensors; the program was captured for {', '.join(inputs)}",
                next_step="compile with example_inputs= that hold as many; target='eager' takes any",
            )
        return list(parts.items())

    def _bound(self, named: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(named)
        for name in given.keys() - set(self.inputs):
            self._refuse_other(name, given[name])
        for name in self.told:
            if name not in given:
                raise self._otherwise(name, "be called without it", f"give {name}={short(self.fixed[name])}")
        for name in self.inputs:
            if name not in given:
                given[name] = self._default(name, given)
        self.sizes.refuse(given)
        for name, size in self.below.items():
            _refuse_outside(name, given[name], size)
        return {name: given[name] for name in self.inputs}

    def _refuse_other(self, name: str, value: Any) -> None:
        """Refuse an argument that is no input, unless it says what the program does anyway."""
        if name not in self.fixed:
            raise ChoiceError(
                f"the compiled program has no input '{name}'",
                nearest=nearest_name(name, (*self.inputs, ADAPTERS_ARGUMENT)) or ", ".join(self.inputs),
                next_step=self._admitting(name),
            )
        if name == RETURN_DICT and self.fixed[name] and value is False:
            return
        if to_json_value(value) != self.fixed[name]:
            step = "compile with it in example_inputs=" if name in self.told else f"leave it out; {_instead(name)}"
            raise self._otherwise(name, f"take {name}={short(to_json_value(value))}", step)

    def _otherwise(self, name: str, what: str, next_step: str) -> InputMismatch:
        return InputMismatch(
            f"the program was captured with {name}={short(self.fixed[name])}, and cannot {what}", next_step=next_step
        )

    def _admitting(self, name: str) -> str:
        """What admits an argument that is no input: of the host's own, one that was not captured."""
        if name in self.arguments:
            return "give it in example_inputs= when compiling"
        return f"it takes {', '.join(self.inputs)}"

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a call gives by the names that the host has for it; what is None is left out."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        return {name: value for name, value in given.items() if value is not None}

    def having(self, values: Mapping[str, Any]) -> Interface:
        """The same with some of what the program does not answer itself, by its name in the output."""
        return self if self.structure is None or not values else replace(self, structure=self.structure.having(values))

    def answer(self, values: list[Any], asked: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The host's output object, and the extra outputs by name.

        Args:
            values: the program's outputs, in order.
            asked: the call's keyword arguments; ``return_dict=False`` among them gets a tuple, as from the host.
        """
        values = self._checked(values)
        own = values[: len(values) - len(self._told)]
        extra = dict(zip(self._told, values[len(own) :], strict=True))
        if self.structure is None:
            return dict(zip(self.outputs, own, strict=False)), extra
        return _as_asked(self.structure.filled(own), asked or {}), extra

    @property
    def _told(self) -> tuple[str, ...]:
        """The extra outputs that are the caller's."""
        return tuple(name for name in self.extra if name not in self.checks)

    def _checked(self, values: list[Any]) -> list[Any]:
        """The outputs without what they have to be true for, which the program answers last.

        Raises:
            InputMismatch: one is not.
        """
        own = values[: len(values) - len(self.checks)]
        for line, holds in zip(self.checks.values(), values[len(own) :], strict=True):
            if not bool(holds):
                raise InputMismatch(
                    f"the inputs hold values that the program is not for, as the model checks at {line}",
                    next_step="give the values that this line wants; target='eager' runs the model itself",
                )
        return own

    def _default(self, name: str, given: Mapping[str, Any]) -> Any:
        """An attention mask may be left out, as the host allows: it is all ones; and what the host makes itself."""
        ids = given.get(name.replace("attention_mask", "input_ids"))
        if name.endswith("attention_mask") and ids is not None:
            return np.ones_like(ids) if isinstance(ids, np.ndarray) else torch.ones_like(ids)
        if (made := self.made(given).get(name)) is not None:
            return made.numpy() if isinstance(ids, np.ndarray) else made
        raise ChoiceError(
            f"the compiled program needs the input '{name}'",
            next_step=f"give what the model makes: {self.derived[name]}"
            if name in self.derived
            else f"it takes {', '.join(self.inputs)}",
        )

    def made(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The inputs that the model makes of others, for a call."""
        made = None if self.positions is None else self.positions.made(given)
        return {} if made is None else {POSITION_IDS: made}

    # --- where it comes from, and how it is stored ---------------------------------------------------------------

    @classmethod
    def of(cls, graph: Graph, host: torch.nn.Module | None = None) -> Interface:
        """How the host is called, read off its captured program.

        Args:
            graph: the program.
            host: tells the order of positional arguments, which a program captured from keywords does not keep.
        """
        from lorac.ir.graph.symbolic_shapes import describe_types  # what loads a signature captures nothing

        exported = graph.exported
        slots = {*(slot.node for slot in graph.slots.values()), *graph.kept.values()}
        inputs = tuple(str(name) for name in exported.graph_signature.user_inputs if name not in slots)
        signature = exported.module_call_graph[0].signature
        assert signature is not None
        spec = signature.out_spec.child(0) if graph.extra_outputs else signature.out_spec
        structure = graph.structure or OutputStructure(spec)
        names = enumerate(name_outputs(structure.spec, inputs))
        outputs = (*(name for i, name in names if i not in structure.constants), *graph.extra_outputs)
        usual = {} if host is None else list_fixed_arguments(host)
        fixed = {name: to_json_value(value) for name, value in graph.fixed.items()}
        return cls(
            inputs=inputs,
            arguments=inputs if host is None else list_positional_arguments(host, inputs),
            outputs=outputs,
            structure=structure,
            extra=tuple(graph.extra_outputs),
            fixed=usual | fixed,
            told=tuple(name for name, value in fixed.items() if name not in usual or usual[name] != value),
            below=_ids(graph, inputs),
            spelled={} if host is None else _spelled(host, inputs),
            sizes=graph.sizes,
            derived={} if graph.positions is None else {POSITION_IDS: graph.positions.call},
            positions=graph.positions,
            rows=graph.rows,
            checks=dict(graph.checks),
            notes=tuple(graph.notes),
            types=describe_types(graph, inputs, outputs),
            unused=tuple(graph.unused),
        )

    def to_json(self) -> dict[str, Any]:
        """The signature as JSON; the output's class by name."""
        names = {name: list(getattr(self, name)) for name in _NAMES}
        checks = {name: line.rpartition("site-packages/")[2] for name, line in self.checks.items()}
        told: dict[str, Any] = {"fixed": dict(self.fixed), "below": dict(self.below), "sizes": self.sizes.to_json()}
        told |= {
            "spelled": dict(self.spelled),
            "types": dict(self.types),
            "checks": checks,
            "derived": dict(self.derived),
        }
        told |= {"rows": None if self.rows is None else self.rows.to_json()}
        return {**names, **told, "output": structure_to_json(self.structure)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Interface:
        """The inverse of ``to_json``.

        Raises:
            ArtifactError: its parts do not fit together, or what is said of sizes is not what lorac stores.
        """
        names = {name: tuple(stored[name]) for name in _NAMES}
        structure, below, spelled = structure_from_json(stored["output"]), stored["below"], stored["spelled"]
        own = len(names["outputs"]) - len(names["extra"])
        texts = all(isinstance(name, str) for listed in names.values() for name in listed)
        known = below.keys() | set(spelled.values()) <= set(names["inputs"])
        fits = (
            known and all(type(size) is int for size in below.values()) and set(names["told"]) <= stored["fixed"].keys()
        )
        if not (texts and fits) or (structure is not None and structure.tensors != own):
            raise ArtifactError(
                f"the signature of a stored program does not fit together: its output has {own} tensors, and inputs "
                f"are {', '.join(map(str, names['inputs']))}",
                next_step="save the artefact again with this version",
            )
        sizes, rows = (
            SizeConstraints.from_json(stored["sizes"]),
            None if stored["rows"] is None else RowLayout.from_json(stored["rows"]),
        )
        told: dict[str, Any] = {**names, **{name: stored[name] for name in ("fixed", "types", "checks", "derived")}}
        return cls(**told, structure=structure, below=below, spelled=spelled, sizes=sizes, rows=rows)


def _as_asked(output: Any, asked: Mapping[str, Any]) -> Any:
    """An output as the keyword arguments of its call ask for it."""
    as_tuple = isinstance(output, Mapping) and asked.get(RETURN_DICT, True) is False
    return tuple(value for value in output.values() if value is not None) if as_tuple else output


def _instead(name: str) -> str:
    """What admits another value of an argument that a program was captured without."""
    if name in CAPTURE_CONFIG:
        return "a program keeps no cache, target='eager' runs the model with its own"
    if name in OUTPUT_SWITCHES:
        return f"model.config.{name}, set before compiling, is what the program does"
    return "target='eager' runs the model itself, with any value"


def program_input_name(argument: str) -> str:
    """What torch calls the input of a program that an argument of forward becomes."""
    return argument.lower()


def _spelled(host: torch.nn.Module, inputs: Collection[str]) -> dict[str, str]:
    """Arguments of forward -> the inputs that torch has other names for, where no argument bears those."""
    arguments = inspect.signature(host.forward).parameters
    return {name: own for name in arguments if (own := program_input_name(name)) in inputs and own not in arguments}


def _ids(graph: Graph, inputs: Collection[str]) -> dict[str, int]:
    """Of the inputs that an embedding reads as ids, be it in another shape or dtype, the size of the smallest one."""
    found: dict[str, int] = {}
    for node in graph.exported.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        ids, size = node.args[1], node.args[0].meta["val"].shape[0]
        while ids.target in _RESHAPING:
            ids = ids.args[0]
        if ids.op == "placeholder" and ids.name in inputs and isinstance(size, int):
            found[ids.name] = min(size, found.get(ids.name, size))
    return found


def _refuse_outside(name: str, given: Any, size: int) -> None:
    """Refuse ids that an embedding of this size does not have; what are no ids is refused elsewhere."""
    values = given.numpy(force=True) if isinstance(given, torch.Tensor) else np.asarray(given)
    if values.dtype.kind not in "iu" or not values.size:
        return
    # Taken without its sign a negative number is a huge one, so that one look at every value will do.
    if int(values.view(f"u{values.itemsize}").max()) >= size:
        wrong = min(int(values.min()), 0) or int(values.max())
        raise ChoiceError(
            f"input '{name}' holds the id {wrong}; its embedding has the ids 0 to {size - 1}",
            next_step="give ids of the model's own tokenizer, and mark padding in the mask",
        )
