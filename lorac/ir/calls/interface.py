"""The interface of a program: the inputs of a call, and its outputs.

A graph has an interface from its capture on; its engine uses the same object, and an artifact stores it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lorac.argument_types import JsonMapping
from lorac.errors import ArtifactError, ChoiceError, InputMismatch, nearest_name, short
from lorac.ir.calls.call import (
    CAPTURE_CONFIG,
    OUTPUT_SWITCHES,
    Call,
    not_numbers_error,
    spread_over_rows,
    to_json_value,
)
from lorac.ir.calls.multimodal_positions import POSITION_IDS, MultimodalPositions
from lorac.ir.calls.output_structure import OutputStructure, structure_from_json, structure_to_json
from lorac.ir.calls.row_layout import RowLayout
from lorac.ir.calls.sizes import SizeConstraints, flatten_argument

ADAPTERS_ARGUMENT = "adapters"
"""The argument of a call that chooses its adapters."""
RETURN_DICT = "return_dict"
"""The argument with which models of transformers and diffusers return a tuple; the program's tensors do not change."""

Inputs = Mapping[str, object]
RunProgram = Callable[[dict[str, object]], Sequence[object]]
"""Function that computes the outputs of a program, in order, from its inputs by name."""
_STORED_NAMES = {
    "inputs": "inputs",
    "arguments": "arguments",
    "outputs": "outputs",
    "extra": "extra_outputs",
    "notes": "notes",
    "unused": "unused_sites",
}
"""Entry of a stored interface -> the field, for fields that are tuples of names."""
_STORED_MAPPINGS = {
    "below": "id_counts",
    "spelled": "aliases",
    "types": "types",
    "derived": "derived",
    "spread": "row_numbers",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Interface:
    """Inputs and outputs of a program, and the calls that it accepts.

    Attributes:
        inputs: names of the inputs, in order.
        arguments: names of the model's arguments, in the order of positional calls.
        outputs: names of the outputs: the model's own, then the extra ones.
        structure: how the model's output is built from the program's tensors; None where only names are known.
        extra_outputs: names of the extra outputs.
        constants: arguments that are constants of the program -> their values in the captured call.
        defaults: arguments that a call may leave out -> the value that the program was captured with.
        id_counts: input of ids -> the number of rows of the smallest embedding that reads it.
        aliases: argument of the model, or path of a tensor in an argument -> the input's name, where the names differ.
        row_numbers: input with one number per row, for which a call may give a single one of any dtype -> an input
            with as many rows.
        sizes: which sizes the inputs may have.
        derived: input that a call may leave out -> the expression by which the model computes it.
        positions: computes the positions of multimodal text; None for a program that was loaded.
        rows: how a call with another number of rows is split; None if it cannot be split.
        checks: extra output that must be true -> the line of the model that checks it.
        notes: sentences for the program's callers.
        types: input or output -> dtype and sizes, with the names of sizes that vary: ``int64[batch, length]``.
        unused_sites: paths of sites with planned slots on which no output depends.
    """

    inputs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    structure: OutputStructure | None = None
    extra_outputs: tuple[str, ...] = ()
    constants: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    id_counts: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    row_numbers: Mapping[str, str] = field(default_factory=dict)
    sizes: SizeConstraints = field(default_factory=SizeConstraints)
    derived: Mapping[str, str] = field(default_factory=dict)
    positions: MultimodalPositions | None = None
    rows: RowLayout | None = None
    checks: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    unused_sites: tuple[str, ...] = ()

    def bind(self, args: tuple[object, ...], kwargs: Inputs) -> Call:
        """Return a call with every argument under the program's name, without arguments that are None.

        Inputs come first, in the program's order.

        Raises:
            ChoiceError: an argument is given twice, or there are too many.
            InputMismatch: an argument has another number of tensors than in the captured call.
        """
        positional = dict(zip(self.arguments, args, strict=False))
        twice = sorted(positional.keys() & kwargs.keys())
        if twice or len(args) > len(self.arguments):
            problem = f"'{twice[0]}' is given twice" if twice else f"{len(args)} positional arguments are too many"
            raise ChoiceError(problem, next_step=f"the model takes {', '.join(self.arguments)}")
        given: dict[str, object] = {}
        for argument, value in (*positional.items(), *kwargs.items()):
            if value is None or (argument.endswith("_kwargs") and value == {}):
                continue
            name = self.aliases.get(argument, argument)
            if name not in self._known and isinstance(value, Mapping | list | tuple):
                given |= self._split_argument(argument, value)
            else:
                given[name] = value
        ordered = {name: given.pop(name) for name in self.inputs if name in given}
        named = {**ordered, **given}
        if self.row_numbers:
            named = spread_over_rows(named, self.row_numbers)
        return Call(kwargs=named, wants_tuple=named.get(RETURN_DICT, True) is False)

    def _split_argument(self, name: str, value: object) -> dict[str, object]:
        """Map the tensors in a container to the program's inputs; return the argument itself if no input is in it."""
        inputs = [known for path, known in self.aliases.items() if path.startswith(f"{name}[")]
        if not inputs:
            return {name: value}
        found = flatten_argument(value, name)
        parts = {self.aliases.get(path, path): tensor for path, tensor in found if tensor is not None}
        if parts.keys() != {*inputs}:
            raise InputMismatch(
                f"argument '{name}' holds {len(parts)} tensors; the program was captured for {', '.join(inputs)}",
                next_step="compile with example_inputs= that hold as many; target='eager' takes any",
            )
        return parts

    def run(self, call: Call, program: RunProgram) -> tuple[object, dict[str, object]]:
        """Run a program for one call; split the call if it has more rows than the program takes.

        Args:
            call: as ``bind`` returned it.
            program: the function that computes the outputs in order.

        Returns:
            The model's output object, and the extra outputs by name.

        Raises:
            ChoiceError, InputMismatch: as ``check``, before the program runs.
        """
        try:
            inputs = self.check(call)
        except InputMismatch:
            if self.rows is None or self.structure is None or self.rows.count_rows(call.kwargs) in (0, self.rows.count):
                raise
            return self._run_in_parts(self.rows, self.structure, call, program)
        return self.build_output(program(inputs), as_tuple=call.wants_tuple)

    def _run_in_parts(
        self, rows: RowLayout, structure: OutputStructure, call: Call, program: RunProgram
    ) -> tuple[object, dict[str, object]]:
        total, parts = rows.count_rows(call.kwargs), [self.check(Call(kwargs=part)) for part in rows.split(call.kwargs)]
        answers = [self.drop_checks(program(inputs)) for inputs in parts]
        count = len(answers[0]) - len(self._caller_outputs)
        output = structure.join([values[:count] for values in answers], rows, total)
        extra = [rows.join(values, total) for values in zip(*(values[count:] for values in answers), strict=True)]
        return _as_tuple(output) if call.wants_tuple else output, dict(zip(self._caller_outputs, extra, strict=True))

    def check(self, call: Call) -> dict[str, object]:
        """Check a call; return the program's inputs for it.

        Raises:
            ChoiceError: an argument is unknown or missing, or an id lies outside its embedding.
            InputMismatch: an input has a size, or an argument a value, that the program was not captured for.
        """
        given = dict(call.kwargs)
        for name, value in call.kwargs.items():
            if name not in self.inputs:
                self._check_constant(name, value)
        for name in self._required:
            if name not in given:
                raise self._mismatch(name, "be called without it", f"give {name}={short(self._fixed[name])}")
        for name in self.inputs:
            if name not in given:
                given[name] = self._make_input(name, given)
        for name in self.sizes.shapes:
            if isinstance(given[name], str | list | tuple | Mapping):
                try:
                    reason = None if np.asarray(given[name]).dtype.kind in "biuf" else short(given[name])
                except (TypeError, ValueError) as error:
                    reason = str(error)
                if reason is not None:
                    raise not_numbers_error(name, reason)
        self.sizes.check(given)
        for name, count in self.id_counts.items():  # other checks refuse values that are not integers
            value = given[name]
            ids = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
            # Viewed as unsigned, a negative number is huge, so that one maximum finds both kinds of invalid ids.
            if ids.dtype.kind in "iu" and ids.size and int(ids.view(f"u{ids.itemsize}").max()) >= count:
                wrong = min(int(ids.min()), 0) or int(ids.max())
                raise ChoiceError(
                    f"input '{name}' holds the id {wrong}; its embedding has the ids 0 to {count - 1}",
                    next_step="give ids of the model's own tokenizer, and mark padding in the mask",
                )
        return {name: given[name] for name in self.inputs}

    def _check_constant(self, name: str, value: object) -> None:
        """Refuse an argument that is neither an input nor has the value that is constant in the program."""
        if name not in self._fixed:
            known = ", ".join(self.inputs)
            raise ChoiceError(
                f"the compiled program has no input '{name}'",
                nearest=nearest_name(name, (*self.inputs, ADAPTERS_ARGUMENT), alike=0.6) or known,
                next_step="give it in example_inputs= when compiling"
                if name in self.arguments
                else f"it takes {known}",
            )
        if name == RETURN_DICT and self._fixed[name] and value is False:
            return
        if to_json_value(value) == self._fixed[name]:
            return
        if name in self._required:
            step = "compile with it in example_inputs="
        elif name in CAPTURE_CONFIG:
            step = "leave it out; a program keeps no cache, target='eager' runs the model with its own"
        elif name in OUTPUT_SWITCHES:
            step = f"leave it out; model.config.{name}, set before compiling, is what the program does"
        else:
            step = "leave it out; target='eager' runs the model itself, with any value"
        raise self._mismatch(name, f"take {name}={short(to_json_value(value))}", step)

    def _mismatch(self, name: str, what: str, next_step: str) -> InputMismatch:
        return InputMismatch(
            f"the program was captured with {name}={short(self._fixed[name])}, and cannot {what}", next_step=next_step
        )

    def _make_input(self, name: str, given: Inputs) -> object:
        """Make an input that a call omits: an attention mask of ones, or an input that the model derives."""
        ids = given.get(name.replace("attention_mask", "input_ids"))
        if name.endswith("attention_mask") and ids is not None:
            return torch.ones_like(ids) if isinstance(ids, torch.Tensor) else np.ones_like(np.asarray(ids))
        if (derived := self.derive_inputs(given).get(name)) is not None:
            return derived.numpy() if isinstance(ids, np.ndarray) else derived
        step = f"it takes {', '.join(self.inputs)}"
        if name in self.derived:
            step = f"give what the model makes: {self.derived[name]}"
        raise ChoiceError(f"the compiled program needs the input '{name}'", next_step=step)

    def derive_inputs(self, given: Inputs) -> dict[str, torch.Tensor]:
        """Compute the inputs that the model derives from its other arguments."""
        positions = None if self.positions is None else self.positions.compute(given)
        return {} if positions is None else {POSITION_IDS: positions}

    @functools.cached_property
    def _known(self) -> Collection[str]:
        """The names of inputs, and of arguments that are constant in the program."""
        return frozenset((*self.inputs, *self._fixed))

    @functools.cached_property
    def _fixed(self) -> Mapping[str, object]:
        """Arguments that are not inputs -> their constant value in the program, as JSON."""
        return {**self.defaults, **{name: to_json_value(value) for name, value in self.constants.items()}}

    @functools.cached_property
    def _required(self) -> tuple[str, ...]:
        """The constants that every call must pass: if they are omitted, the model uses another value."""
        missing = object()
        return tuple(name for name in self.constants if self.defaults.get(name, missing) != self._fixed[name])

    def build_output(self, values: Sequence[object], *, as_tuple: bool = False) -> tuple[object, dict[str, object]]:
        """Build the model's output object from the program's outputs.

        Args:
            values: the program's outputs, in order.
            as_tuple: return a tuple, as the model does with ``return_dict=False``.

        Returns:
            The output object, and the extra outputs by name.

        Raises:
            InputMismatch: a check of the model fails.
        """
        values = self.drop_checks(values) if self.checks else values
        count = len(values) - len(self._caller_outputs)
        extra = dict(zip(self._caller_outputs, values[count:], strict=True))
        if self.structure is None:
            return dict(zip(self.outputs, values[:count], strict=False)), extra
        output = self.structure.fill(values[:count])
        return _as_tuple(output) if as_tuple else output, extra

    @functools.cached_property
    def _caller_outputs(self) -> tuple[str, ...]:
        """The extra outputs that are returned to the caller."""
        return tuple(name for name in self.extra_outputs if name not in self.checks)

    def drop_checks(self, values: Sequence[object]) -> Sequence[object]:
        """Check the outputs that must be true, which come last; return the other outputs.

        Raises:
            InputMismatch: a check of the model fails.
        """
        count = len(values) - len(self.checks)
        for line, holds in zip(self.checks.values(), values[count:], strict=True):
            if not bool(holds):
                raise InputMismatch(
                    f"the program was captured for other values of the inputs, and the model checks them at {line}",
                    next_step="give values that pass this check; target='eager' runs the model itself",
                )
        return values[:count]

    def with_notes(self, *notes: str) -> Interface:
        """Return a copy with these notes added; duplicates are dropped."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def with_values(self, values: Mapping[str, object]) -> Interface:
        """Return a copy whose output has these values in place of its constants, by name in the output."""
        if self.structure is None or not values:
            return self
        return replace(self, structure=self.structure.with_values(values))

    def restrict(self, inputs: Collection[str], structure: OutputStructure) -> Interface:
        """Return the interface of a part of the program that has some of the inputs and another output."""
        names = tuple(name for name in self.inputs if name in inputs)
        return replace(
            self,
            inputs=names,
            outputs=structure.tensor_names(names),
            structure=structure,
            id_counts={name: count for name, count in self.id_counts.items() if name in names},
            aliases={argument: name for argument, name in self.aliases.items() if name in names},
            sizes=self.sizes.restrict(names),
        )

    def to_json(self) -> dict[str, object]:
        """Return the interface as JSON, with the output's class by name."""
        names = {entry: list(getattr(self, name)) for entry, name in _STORED_NAMES.items()}
        mappings = {entry: dict(getattr(self, name)) for entry, name in _STORED_MAPPINGS.items()}
        return {
            **names,
            **mappings,
            "told": list(self._required),
            "fixed": dict(self._fixed),
            "sizes": self.sizes.to_json(),
            # Store a library's line without the folder, which differs between machines.
            "checks": {name: line.rpartition("site-packages/")[2] for name, line in self.checks.items()},
            "rows": None if self.rows is None else self.rows.to_json(),
            "output": structure_to_json(self.structure),
        }

    @classmethod
    def from_json(cls, stored: JsonMapping) -> Interface:
        """Read an interface that ``to_json`` wrote.

        Raises:
            ArtifactError: its parts contradict one another.
        """
        names: JsonMapping = {name: tuple(stored[entry]) for entry, name in _STORED_NAMES.items()}
        mappings: JsonMapping = {name: stored[entry] for entry, name in _STORED_MAPPINGS.items()}
        structure, fixed, required = structure_from_json(stored["output"]), stored["fixed"], stored["told"]
        count = len(names["outputs"]) - len(names["extra_outputs"])
        fits = all(isinstance(name, str) for listed in (*names.values(), required) for name in listed)
        fits &= all(isinstance(table, dict) for table in (*mappings.values(), fixed, stored["checks"]))
        if fits:
            kinds = {name: int if name == "id_counts" else str for name in mappings} | {"checks": str}
            tables = {**mappings, "checks": stored["checks"]}
            fits = all(type(value) is kinds[name] for name, table in tables.items() for value in table.values())
        if fits:
            fits = mappings["id_counts"].keys() | {*mappings["aliases"].values()} <= {*names["inputs"]}
            fits &= {*required} <= fixed.keys() and stored["checks"].keys() <= {*names["extra_outputs"]}
        if not fits or (structure is not None and structure.tensor_count != count):
            raise ArtifactError(
                f"the signature of a stored program does not fit together: its output has {count} tensors, and inputs "
                f"are {', '.join(map(str, names['inputs']))}",
                next_step="save the artifact again with this version",
            )
        return cls(
            **names,
            **mappings,
            structure=structure,
            constants={name: value for name, value in fixed.items() if name in required},
            defaults={name: value for name, value in fixed.items() if name not in required},
            sizes=SizeConstraints.from_json(stored["sizes"]),
            rows=None if stored["rows"] is None else RowLayout.from_json(stored["rows"]),
            checks=stored["checks"],
        )


def _as_tuple(output: object) -> object:
    return tuple(value for value in output.values() if value is not None) if isinstance(output, Mapping) else output
