"""Every error lorac raises on purpose.

    LoracError
    ├── SiteError
    │   ├── SiteNotFound          a pattern, or a tensor's path, names no site
    │   ├── SiteUnsupported       the method cannot adapt this kind of site
    │   └── SiteUnreached         the site exists, but no captured graph calls it
    ├── AdapterError
    │   ├── AdapterNotFound       an unknown or removed adapter name
    │   ├── AdapterExists         the name is taken
    │   ├── ShapeMismatch         a tensor's shape does not fit its site
    │   ├── NonFinite             NaN or infinity in a tensor or a hyper-parameter
    │   ├── WrongDtype            numbers of another kind than the method takes
    │   ├── WrongIndex            positions outside the weight, or given twice
    │   ├── FormulaFailed         a method's formula raises, writes into its arguments or answers something else
    │   ├── UnknownMethod         a method whose class is not imported here
    │   ├── BaseMismatch          the adapter was made for other base weights
    │   ├── BaseNeeded            the operation needs the base weights
    │   └── BatchesNeeded         the operation needs data, with a loss or enough of it
    ├── FormatError
    │   ├── CorruptFile           truncated or lying headers
    │   ├── UnknownFormat         no format recognises the file
    │   ├── UnknownField          a configuration field or type lorac does not know
    │   ├── UnsupportedField      a known field whose value changes the result in a way lorac lacks
    │   ├── UnusedTensors         tensors that no rule of the format accounts for
    │   ├── PatternTooSlow        a pattern from a file that backtracks, or compiles, without end
    │   ├── OverBudget            more time or memory than reading one file may take
    │   └── Unreadable            the system does not give the file, or take it: missing, forbidden, full
    ├── CompileError
    │   ├── CaptureFailed         the model cannot be copied or traced, or its weights are no constants
    │   ├── CaptureDiffers        torch.export gave another program than the model
    │   ├── ExampleInputsNeeded   example inputs cannot be made from the model, or the model does not take those given
    │   ├── UnknownOption         an option the target does not have
    │   ├── NotMergeable          a term that has no weight form was to be fused or baked
    │   ├── WrongLevel            a pass was to run on a graph at another level than it reads
    │   ├── VerificationFailed    a graph breaks a rule of its level
    │   └── SelfTestFailed        a slot was folded, copied, exchanged or bypassed
    ├── RuntimeFailure
    │   ├── NeedsRecompile        the adapter does not fit what was reserved
    │   ├── ChoiceError           a choice of adapters that makes no sense (rows, strengths)
    │   ├── InputMismatch         an input of a size, or a value, that the program was not captured for
    │   └── Unavailable           the target cannot do this at all
    │       └── EagerOnly         what training needs, and only target="eager" has (an AttributeError too)
    ├── ArtifactError             a saved artefact is damaged, unsafe or of another version
    ├── WrongType                 an argument, or a hyper-parameter, is of another kind than is taken (a TypeError too)
    └── MissingExtra              an optional library is not installed

Each message says what, where, the nearest valid choice and the next step. What is no error, but must not pass in
silence, is a ``LoracWarning``.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "AdapterError",
    "AdapterExists",
    "AdapterNotFound",
    "ArtifactError",
    "BaseMismatch",
    "BaseNeeded",
    "BatchesNeeded",
    "CaptureDiffers",
    "CaptureFailed",
    "ChoiceError",
    "CompileError",
    "CorruptFile",
    "EagerOnly",
    "ExampleInputsNeeded",
    "FormatError",
    "FormulaFailed",
    "InputMismatch",
    "LoracError",
    "LoracWarning",
    "MissingExtra",
    "NeedsRecompile",
    "NonFinite",
    "NotMergeable",
    "OverBudget",
    "PatternTooSlow",
    "RuntimeFailure",
    "SelfTestFailed",
    "ShapeMismatch",
    "SiteError",
    "SiteNotFound",
    "SiteUnreached",
    "SiteUnsupported",
    "Unavailable",
    "UnknownField",
    "UnknownFormat",
    "UnknownMethod",
    "UnknownOption",
    "Unreadable",
    "UnsupportedField",
    "UnusedTensors",
    "VerificationFailed",
    "WrongDtype",
    "WrongIndex",
    "WrongLevel",
    "WrongType",
]


class LoracError(Exception):
    """Base of every error lorac raises on purpose.

    Args:
        what: what went wrong and where, one line.
        nearest: the nearest valid choice, if there is one.
        next_step: what to do about it; default: what there is to do about every error of its class.
    """

    usual: ClassVar[str | None] = None
    """What there is to do about every error of the class, where that is one thing."""

    def __init__(self, what: str, *, nearest: str | None = None, next_step: str | None = None) -> None:
        self.what = what
        self.nearest = nearest
        self.next_step = next_step or self.usual
        lines = [what]
        if nearest:
            lines.append(f"  nearest: {nearest}")
        if self.next_step:
            lines.append(f"  {self.next_step}")
        super().__init__("\n".join(lines))


class SiteError(LoracError):
    """Something about where an adapter goes."""


class SiteNotFound(SiteError):
    """A pattern, or a tensor's path, names no site of the model."""


class SiteUnsupported(SiteError):
    """The method cannot adapt this kind of site."""


class SiteUnreached(SiteError):
    """The site exists, but no captured graph calls it."""


class AdapterError(LoracError):
    """Something about an adapter itself."""


class AdapterNotFound(AdapterError):
    """An unknown or removed adapter name."""


class AdapterExists(AdapterError):
    """The adapter name is taken."""


class ShapeMismatch(AdapterError):
    """A tensor's shape does not fit its site."""


class NonFinite(AdapterError):
    """A tensor, or a hyper-parameter, is NaN or infinite."""


class WrongDtype(AdapterError):
    """A tensor's numbers are of another kind: complex, or whole where fractions are due, or the other way round."""


class WrongIndex(AdapterError):
    """Positions that lie outside the weight, or of which one is given twice."""


class FormulaFailed(AdapterError):
    """A method's formula raises, writes into its arguments, or answers no tensor like the one it changes.

    The message names the method, the site and the line of the method's file.
    """


class UnknownMethod(AdapterError):
    """A method is known by name only, and its class is needed; the message names the module to import."""


class BaseMismatch(AdapterError):
    """The adapter was made for other base weights than these."""


class BaseNeeded(AdapterError):
    """The operation depends on the base weights, and no model was given."""


class BatchesNeeded(AdapterError):
    """The operation needs data: batches, with a loss where it needs gradients, and enough of them."""


class FormatError(LoracError):
    """Something about an adapter file."""


class CorruptFile(FormatError):
    """Truncated file, or headers that do not fit its contents."""

    usual = "copy or download the file again"


class UnknownFormat(FormatError):
    """No format recognises the file."""


class UnknownField(FormatError):
    """A configuration field or adapter type that lorac does not know."""


class UnsupportedField(FormatError):
    """A known field whose value changes the result in a way lorac does not build."""


class UnusedTensors(FormatError):
    """An adapter, or its file, holds tensors that no rule of its method or format accounts for."""


class PatternTooSlow(FormatError):
    """A pattern from a file does not finish compiling, or matching, in bounded time."""


class OverBudget(FormatError):
    """Reading a file takes more time or memory than one file may (``lorac.budget``)."""


class Unreadable(FormatError):
    """The system does not give a file, or does not take it; the message has its path and the system's reason."""


class CompileError(LoracError):
    """Something that stops a compilation."""


class CaptureFailed(CompileError):
    """torch.export cannot trace the model, or forward writes its weights; the message names the line or the weight."""


class CaptureDiffers(CompileError):
    """The program that torch.export captured answers otherwise than the model; the message names the output."""


class ExampleInputsNeeded(CompileError):
    """Example inputs cannot be made from the model, or it cannot be called with those that were given.

    The message names forward's arguments.
    """


class UnknownOption(CompileError):
    """An option, mode or target that does not exist."""


class NotMergeable(CompileError):
    """A term without a weight form was to be fused or baked."""


class WrongLevel(CompileError):
    """A pass was to run on a graph at another level than it reads."""


class VerificationFailed(CompileError):
    """A graph breaks a rule of its level."""

    usual = "this is a bug in a pass, not in your model"


class SelfTestFailed(CompileError):
    """A slot was folded, copied, exchanged or bypassed by the emitter."""


class RuntimeFailure(LoracError):
    """Something a compiled model refuses at run time."""


class NeedsRecompile(RuntimeFailure):
    """The adapter does not fit what was reserved; the message prints the ``reserve=`` that admits it."""


class ChoiceError(RuntimeFailure):
    """A choice of adapters that makes no sense: rows that do not match, strengths that are not finite."""


class InputMismatch(RuntimeFailure):
    """An argument of a call has a size, or a value, that the program was not captured for; the message names both."""


class Unavailable(RuntimeFailure):
    """The target cannot do this at all."""


class EagerOnly(Unavailable, AttributeError):
    """An attribute that training needs, and that a compiled model has on target ``"eager"`` alone."""


class WrongType(LoracError, TypeError):
    """An argument, or a hyper-parameter, is of another kind than the one that is taken."""


class ArtifactError(LoracError):
    """A saved artefact is damaged, unsafe, or of another version."""

    usual = "copy the whole folder again, or save it anew with this version"


class MissingExtra(LoracError):
    """An optional library is not installed; the message gives the pip command."""

    def __init__(self, library: str, extra: str | None) -> None:
        needed = f"'lorac[{extra}]'" if extra is not None else library
        super().__init__(f"{library} is not installed", next_step=f"pip install {needed}")


def none_of(what: str, value: object, known: Iterable[str]) -> UnknownOption:
    """The error for a value that is none of those there are.

    Args:
        what: what there is not, up to the value: "there is no mode".
        value: what was given.
        known: what there is.
    """
    listed = list(known)
    step = f"it is one of {', '.join(listed)}"
    return UnknownOption(f"{what} {short(value)}", nearest=nearest_name(str(value), listed), next_step=step)


class LoracWarning(UserWarning):
    """Something that is no error, and that whoever gets the result should know."""


def warn(what: str, *, next_step: str | None = None) -> None:
    """Warn once per line of the caller's own code, as Python's filters have it.

    Args:
        what: what is so and where, one line.
        next_step: what to do about it.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lorac":
        level, frame = level + 1, frame.f_back
    text = what if next_step is None else f"{what}\n  {next_step}"
    warnings.warn(text, LoracWarning, stacklevel=level)


_LONGEST = 200


def short(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def nearest_name(name: str, choices: Iterable[str], *, alike: float = 0.4) -> str | None:
    """The choice most like ``name``, whatever is written large, or None when nothing resembles it.

    Args:
        name: what was given.
        choices: what there is.
        alike: from 0 to 1, how much of both has to agree.
    """
    known = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(name.lower(), known, n=1, cutoff=alike)
    return known[matches[0]] if matches else None
