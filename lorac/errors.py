"""Errors that lorac raises on purpose.

Every error is a ``LoracError`` with a message of one or two sentences, the nearest valid choice where there is one, the
next step, and a stable ``code``. Errors that callers catch separately have separate classes; the code distinguishes the
cases of a class.

    LoracError
    ├── SiteError                 where an adapter goes: unknown, unsupported or never called
    ├── AdapterError              an adapter's own tensors, formula or base
    │   ├── AdapterNotFound       no adapter has the name
    │   ├── UnknownMethod         the class of a method is not imported
    │   └── BaseNeeded            the operation needs the base weights
    ├── FormatError               an adapter file
    ├── CompileError              a compilation stops
    │   ├── CaptureError          torch.export cannot capture the model, or captures another program
    │   ├── ExampleInputsNeeded   example inputs cannot be made, or do not fit the model
    │   └── OptionError           an option, mode or target that does not exist
    ├── NeedsRecompile            the adapter does not fit the reserved slots
    ├── ChoiceError               a choice of adapters that makes no sense
    ├── InputMismatch             an input that the program was not captured for
    ├── OverBudget                there is no memory left for it now
    ├── Unavailable               the target cannot do this at all
    │   └── EagerOnly             an attribute that only target="eager" has (also an AttributeError)
    ├── UnknownAttribute          an attribute that a compiled model lacks (also an AttributeError)
    ├── ArtifactError             a saved artifact is damaged, unsafe or of another version
    ├── WrongType                 an argument of the wrong type (also a TypeError)
    └── MissingExtra              an optional library is not installed

A ``LoracWarning`` is not an error, but the caller should notice it.
"""

import contextlib
import copyreg
import difflib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Self, TypeVar

T = TypeVar("T")

__all__ = [
    "AdapterError",
    "AdapterNotFound",
    "ArtifactError",
    "BaseNeeded",
    "CaptureError",
    "ChoiceError",
    "CompileError",
    "EagerOnly",
    "ExampleInputsNeeded",
    "FormatError",
    "InputMismatch",
    "LoracError",
    "LoracWarning",
    "MissingExtra",
    "NeedsRecompile",
    "OptionError",
    "OverBudget",
    "SiteError",
    "Unavailable",
    "UnknownAttribute",
    "UnknownMethod",
    "WrongType",
]


TESTED = {"torch": "2.15", "transformers": "5.24"}
"""Library whose private parts are used -> the newest release that lorac was tested with; newer ones are admitted."""


class LoracError(Exception):
    """Base of every error that lorac raises on purpose.

    Args:
        what: the fault and its place, in one line.
        nearest: the nearest valid choice, if there is one.
        next_step: a step that corrects it; default: the usual next step of the code.
        code: the case within the class; default: the class's ``usual_code``, or the class's name in snake case.

    Attributes:
        code: a name of the case that callers can compare; it is stable across versions.
    """

    codes: ClassVar[Mapping[str, str]] = {}
    """The codes of the class, each with its meaning."""
    usual_code: ClassVar[str | None] = None
    """The code of most errors of the class."""
    usual_steps: ClassVar[Mapping[str, str]] = {}
    """Code -> the next step of every such error, where it is always the same."""

    def __init__(
        self, what: str, *, nearest: str | None = None, next_step: str | None = None, code: str | None = None
    ) -> None:
        self.code = code or self.usual_code or re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        assert code is None or code in self.codes, f"{type(self).__name__} has no code '{code}'"
        self.what = escape_controls(what)
        self.nearest = nearest and escape_controls(nearest)
        self.next_step = escape_controls(next_step) if next_step else self.usual_steps.get(self.code)
        lines = [self.what]
        if self.nearest:
            lines.append(f"  nearest: {self.nearest}")
        if self.next_step:
            lines.append(f"  {self.next_step}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # An exception is copied by a call of its class with the message alone, which these classes do not take.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]  # pickle's own


class SiteError(LoracError):
    """An adapter's place in the model is unknown, unsupported, or never called."""

    codes: ClassVar[Mapping[str, str]] = {
        "site_not_found": "a pattern, or a tensor's path, names no site of the model",
        "site_unsupported": "the method cannot adapt this kind of site",
        "site_unreached": "the site exists, but no captured graph calls it",
    }
    usual_code = "site_unsupported"


class AdapterError(LoracError):
    """An adapter's tensors, formula or base weights are wrong."""

    codes: ClassVar[Mapping[str, str]] = {
        "adapter_exists": "the name is taken",
        "shape_mismatch": "a tensor's shape does not fit its site",
        "non_finite": "a tensor or a hyper-parameter is NaN or infinite",
        "wrong_dtype": "a tensor is complex, or whole where fractions are due, or the other way round",
        "wrong_index": "positions lie outside the weight, or one is given twice",
        "formula_failed": "a method's formula raises, writes into its arguments or returns something else",
        "base_mismatch": "the adapter was made for other base weights",
        "over_quota": "the adapter has more sites, or a larger rank, than a server admits",
        "batches_needed": "the operation needs batches of data, with a loss or enough of them",
    }


class AdapterNotFound(AdapterError):
    """No adapter has the name, or it was removed."""


class UnknownMethod(AdapterError):
    """The class of a method is needed and not imported; the message names the module to import."""


class BaseNeeded(AdapterError):
    """The operation needs the base weights, and no model was given, or a model without values."""


class FormatError(LoracError):
    """An adapter file cannot be read or written."""

    codes: ClassVar[Mapping[str, str]] = {
        "corrupt_file": "the file is truncated, or its header does not fit its contents",
        "unknown_format": "no format recognises the file",
        "unknown_field": "lorac does not know a configuration field or adapter type",
        "unsupported_field": "a known field has a value that lorac does not implement",
        "unused_tensors": "no rule of the method or format accounts for some tensors",
        "pattern_too_slow": "a pattern from the file does not compile or match in bounded time",
        "over_budget": "reading takes more time or memory than one file may (lorac.budget)",
        "unreadable": "the system does not give the file or take it: missing, forbidden, full",
    }
    usual_steps: ClassVar[Mapping[str, str]] = {"corrupt_file": "copy or download the file again"}


class CompileError(LoracError):
    """A compilation stops."""

    codes: ClassVar[Mapping[str, str]] = {
        "not_mergeable": "a term without a weight form was to be fused or baked",
        "wrong_level": "a pass was to run on a graph of another level than it reads",
        "verification_failed": "a graph breaks a rule of its level",
        "self_test_failed": "emission folded, copied, exchanged or bypassed a slot",
        "self_test_undecided": "the model amplifies roundings, so that its outputs tell nothing of what was emitted",
    }
    usual_steps: ClassVar[Mapping[str, str]] = {"verification_failed": "this is a bug in a pass, not in your model"}


class CaptureError(CompileError):
    """torch.export cannot capture the model, or captures a program that computes something else."""

    codes: ClassVar[Mapping[str, str]] = {
        "capture_failed": "the model cannot be copied or traced, or its forward writes its weights",
        "capture_differs": "the captured program gives other outputs than the model",
    }
    usual_code = "capture_failed"


class ExampleInputsNeeded(CompileError):
    """Example inputs cannot be made from the model, or the model cannot be called with the given inputs.

    The message names forward's arguments.
    """


class OptionError(CompileError):
    """An option, mode or target does not exist, or has a value that it cannot have."""


class NeedsRecompile(LoracError):
    """The adapter does not fit the reserved slots; the message prints the ``reserve=`` that admits it."""


class ChoiceError(LoracError):
    """A choice of adapters makes no sense: rows that do not match, strengths that are not finite."""


class InputMismatch(LoracError):
    """An argument of a call has a size, or a value, that the program was not captured for; the message names both."""


class OverBudget(LoracError):
    """The operation has no room now, and may have room later. Nothing was changed.

    Attributes:
        permanent: whether it will never have room: it alone takes more than the whole budget.
    """

    permanent = False

    def for_good(self) -> Self:
        """Mark the error as permanent, and return it."""
        self.permanent = True
        return self

    codes: ClassVar[Mapping[str, str]] = {
        "over_budget": "``compiled.memory`` has no room for it: what is held leaves too little",
        "queue_full": "as many requests wait as a scheduler admits",
        "stopping": "a scheduler takes no more requests, since its server stops",
        "quota_full": "a tenant of a server has as many adapters, or bytes of them, as it may",
        "too_many_uploads": "a tenant of a server has uploaded as often as it may within a minute",
    }


class Unavailable(LoracError):
    """The target cannot do this at all."""


class EagerOnly(Unavailable, AttributeError):
    """An attribute that training needs, and that a compiled model has on target ``"eager"`` alone."""


class UnknownAttribute(LoracError, AttributeError):
    """A compiled model has no such attribute; the message names lorac's equivalent of another library's method."""


class ArtifactError(LoracError):
    """A saved artifact is damaged, unsafe, or of another version."""

    usual_steps: ClassVar[Mapping[str, str]] = {
        "artifact_error": "copy the whole folder again, or save it anew with this version"
    }


class WrongType(LoracError, TypeError):
    """An argument, or a hyper-parameter, has the wrong type."""


EXTRAS: Mapping[str, str | None] = {
    **dict.fromkeys(("bitsandbytes", "matplotlib", "tensorrt")),
    **{name: name for name in ("diffusers", "gguf", "openvino", "ray")},
    **dict.fromkeys(("accelerate", "huggingface_hub", "threadpoolctl", "transformers"), "hf"),
    **dict.fromkeys(("lorac-native", "lorac_native"), "native"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxruntime", "onnxscript"), "onnxruntime"),
    **dict.fromkeys(("PIL", "fastapi", "llguidance", "prometheus_client", "python_multipart", "uvicorn"), "serve"),
    **dict.fromkeys(("fsspec", "gcsfs", "s3fs"), "stores"),
    "tensorrt_rtx": "tensorrt",
    **dict.fromkeys(("datasets", "trl"), "train"),
}
"""Optional library, as it is imported -> the extra of lorac that installs it; None: no extra does."""


class MissingExtra(LoracError):
    """An optional library is not installed; the message gives the pip command.

    Args:
        library: the library's name.
        extra: the extra of lorac that installs it; default: the library's extra in ``EXTRAS``.
    """

    def __init__(self, library: str, extra: str | None = None) -> None:
        extra = extra or EXTRAS.get(library)
        needed = f'"lorac[{extra}]"' if extra is not None else library
        super().__init__(f"{library} is not installed", next_step=f"pip install {needed}")


def check_release(purpose: str, library: str, found: str, needed: str, *, otherwise: str) -> None:
    """Raise ``Unavailable`` for a release of a library that is older than a purpose needs.

    Args:
        purpose: the subject of the sentence: "generation over a cache".
        library: its name on PyPI.
        found, needed: releases, such as "5.24.0" and "5.24".
        otherwise: how to do without: "compile without cache=True".
    """
    if _is_older(found, needed):
        step = f"pip install '{library}>={needed}', or {otherwise}"
        raise Unavailable(f"{purpose} needs {library} ≥ {needed}, found {found}", next_step=step)


def find_untested() -> str | None:
    """Return the next step if a library is newer than the tested releases, and so may cause a fault; else None."""
    for library, tested in TESTED.items():
        found = str(getattr(sys.modules.get(library), "__version__", tested))
        if _is_older(tested, found):
            return f"pip install '{library}=={tested}.*': lorac was tested up to that release, and this is {found}"
    return None


def _is_older(version: str, other: str) -> bool:
    first, second = (tuple(map(int, re.findall(r"\d+", one)[:2])) for one in (version, other))
    return first < second


def not_one_of(problem: str, value: object, known: Iterable[str]) -> OptionError:
    """Return the error for a value that is not one of the known values.

    Args:
        problem: the sentence up to the value: "there is no mode".
        value: the value that was given.
        known: the values that exist.
    """
    listed, given = list(known), str(value)
    meant = [one for one in listed if _abbreviates(given, one)]
    nearest = meant[0] if len(meant) == 1 else nearest_name(given, listed, alike=0.6)
    step = f"it is one of {', '.join(listed)}" if listed else "leave it out: there is none"
    return OptionError(f"{problem} {short(value)}", nearest=nearest, next_step=step)


def shape_error(what: str, *, next_step: str) -> AdapterError:
    """Return the error for a tensor whose shape does not fit its site."""
    return AdapterError(what, next_step=next_step, code="shape_mismatch")


def unused_error(what: str, *, next_step: str, nearest: str | None = None) -> FormatError:
    """Return the error for a tensor that no rule of a method or format accounts for."""
    return FormatError(what, nearest=nearest, next_step=next_step, code="unused_tensors")


def missing_site_error(what: str, *, next_step: str, nearest: str | None = None) -> SiteError:
    """Return the error for a name of a site that the model does not have."""
    return SiteError(what, nearest=nearest, next_step=next_step, code="site_not_found")


def unmergeable_error(what: str, *, next_step: str) -> CompileError:
    """Return the error for a change that cannot be merged into a weight."""
    return CompileError(what, next_step=next_step, code="not_mergeable")


def require_base(found: T | None, what: str, *, next_step: str = "pass model=") -> T:
    """Return ``found``, such as the base model; raise ``BaseNeeded`` if it is None."""
    if found is None:
        raise BaseNeeded(what, next_step=next_step)
    return found


def check_known(given: Iterable[str], known: Collection[str], problem: str) -> None:
    """Raise ``not_one_of`` for the first of some names that is not known."""
    for name in given:
        if name not in known:
            raise not_one_of(problem, name, known)


def _abbreviates(given: str, word: str) -> bool:
    """Return whether ``given``, of at least three letters, is ``word`` without some letters after the first."""
    letters = iter(word)
    return len(given) >= 3 and given[0] == word[:1] and all(letter in letters for letter in given)


class LoracWarning(UserWarning):
    """A fact that is not an error, but that the user of the result should know."""


def warn(fact: str, *, next_step: str | None = None) -> None:
    """Warn at the line of the caller's own code.

    Args:
        fact: the fact and its place, in one line.
        next_step: a step that changes it.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lorac":
        level, frame = level + 1, frame.f_back
    text = fact if next_step is None else f"{fact}\n  {next_step}"
    warnings.warn(escape_controls(text), LoracWarning, stacklevel=level)


@contextlib.contextmanager
def translate_errors(
    kind: Callable[..., LoracError],
    problem: str,
    *,
    next_step: str | None = None,
    unless: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Raise lorac's own error for any exception of another library in the block, with its message in one line.

    Args:
        kind: the error to raise.
        problem: the sentence before the library's message.
        next_step: a step that corrects it.
        unless: called after an exception; if it returns True, the exception is raised unchanged.
    """
    try:
        yield
    except Exception as error:  # other libraries may raise any error
        if isinstance(error, LoracError) or unless():
            raise
        said = ": ".join(str(one) for one in (error, error.__cause__) if one is not None)
        raise kind(f"{problem}: {' '.join(said.split())}", next_step=next_step) from error


@contextlib.contextmanager
def translate_import_errors() -> Iterator[None]:
    """Raise a typed error where the block imports a library of ``EXTRAS`` that is not installed, or too new."""
    try:
        yield
    except ModuleNotFoundError as error:
        # transformers and TRL import their parts lazily: their error has no name, but its cause has.
        names = (getattr(one, "name", None) or "" for one in (error, error.__cause__))
        missing = next((library for name in names if (library := name.partition(".")[0]) in EXTRAS), None)
        if missing is None:
            raise
        raise MissingExtra(missing) from error
    except ImportError as error:  # a name that a module no longer has
        if step := find_untested():
            raise Unavailable(str(error), next_step=step) from error
        raise


@contextlib.contextmanager
def replace_in_errors(internal: str, known: str) -> Iterator[None]:
    """Replace an internal name or path in the errors of the block by one that the caller knows."""
    try:
        yield
    except LoracError as error:
        what, nearest, step = (
            text and text.replace(internal, known) for text in (error.what, error.nearest, error.next_step)
        )
        code = error.code if error.code in error.codes else None
        LoracError.__init__(error, str(what), nearest=nearest, next_step=step, code=code)
        raise


def escape_controls(text: str) -> str:
    """Escape the characters of a text that a terminal does not print, except line breaks and tabs.

    Names come from files, and some characters are commands to a terminal. Every text for people passes through this
    function: messages, summaries, reports and the output of commands.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def drop_frames(error: BaseException) -> None:
    """Remove the frames of an error and its causes, which would keep a failed call's memory until a garbage collection.

    An error that is not lorac's keeps the text of its traceback as a note.
    """
    if not isinstance(error, LoracError):
        error.add_note("".join(traceback.format_exception(error)))
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            chain += [one.__cause__, one.__context__]


_LONGEST = 200


def short(value: object) -> str:
    """Return a value's repr for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def list_some(names: Sequence[str], most: int = 5, quote: str = "'") -> str:
    """Return the first of some names, and how many more there are: "'a', 'b' and 3 more"."""
    listed = ", ".join(f"{quote}{name}{quote}" for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest_name(name: str, choices: Iterable[str], *, alike: float = 0.4) -> str | None:
    """Return the choice most like ``name``, ignoring case, or None when nothing resembles it.

    Args:
        name: the name that was given.
        choices: the names that exist.
        alike: how much of both has to agree, from 0 to 1.
    """
    known = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(name.lower(), known, n=1, cutoff=alike)
    return known[matches[0]] if matches else None
