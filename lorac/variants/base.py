"""The base classes of methods: hyper-parameters, the tensors of a site, and one formula.

Every concrete method is a final, frozen dataclass in a file of this folder. It defines ``params`` and one
formula; merging, unmerging, saving, exporting and counting are derived. Methods import all that they need from here.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from lorac.argument_types import check_fields
from lorac.errors import FormatError, SiteError, WrongType, nearest_name, short
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites.patterns import find_first_pattern, select_sites
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.ir.slots.prefix import Prefix
from lorac.variants.params import Init, InitContext, ParamSpec, Role

__all__ = [
    "MATRIX_KINDS",
    "BranchVariant",
    "Context",
    "Dropout",
    "Init",
    "InitContext",
    "ParamSpec",
    "Params",
    "PromptVariant",
    "Role",
    "Site",
    "SiteKind",
    "Tensor",
    "Variant",
    "WeightVariant",
]

MATRIX_KINDS = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D, SiteKind.EMBEDDING})


class Context(Protocol):
    """The context of a branch's formula: all that it may use besides its arguments.

    Attributes:
        training: whether the model trains.
        passing: the name of the pass in which the formula runs (``BranchVariant.reads_once``); empty in the call's main
            pass. In a named pass, values of ``once`` do not exist yet.
    """

    training: bool
    passing: str

    @property
    def site(self) -> Site:
        """The site whose output the formula changes."""

    @property
    def generator(self) -> torch.Generator | None:
        """In training a random generator, seeded anew for every call with one seed for all sites; else None."""

    def value(self, name: str) -> Tensor:
        """Return a value of the program, such as a hidden state of the base pass."""

    def emit(self, name: str, tensor: Tensor) -> None:
        """Emit an extra output under ``name`` and the site's path."""

    def positions(self, x: Tensor) -> Tensor:
        """Return the positions of the tokens of x (batch, length, features) in their sequences.

        The result broadcasts to (batch, length). With a cache the call has only the new tokens, and their positions
        continue those in the cache.
        """

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Compute attention over the call's tokens and the cached tokens before them: (batch, length, heads, size).

        The model's cache stores these keys and values in addition to the model's.

        Args:
            q: queries (batch, heads, length, size).
            k, v: keys and values (batch, heads of keys, length, size); a group of query heads may share a head of keys.
            causal: whether tokens attend only to earlier tokens and themselves; a cache requires it.
            mask: true for tokens that are not padding (batch, length), as the call passes it; each token attends to
                itself.
            scale: factor of the scores. Default: 1/√size.
        """


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """The hyper-parameters that all methods have, under PEFT's names without the method's prefix.

    Attributes:
        targets: as PEFT's ``target_modules``: suffixes, one regular expression or ``"all-linear"``; also
            ``"all-conv"``, and ``"all-blocks"`` for methods on blocks.
        parameters: PEFT's ``target_parameters``: matrices that modules multiply in their own forward (experts'
            weights), by suffixes of their names.
        exclude: PEFT's ``exclude_modules``.
        layers: PEFT's ``layers_to_transform``: the layer indices to adapt.
        layers_pattern: PEFT's ``layers_pattern``: name of the list of layers.
        modules_to_save: modules trained and stored whole, in addition to the adapter.
        bias: which of the base's biases are trained: ``"none"``, ``"all"`` or the method's ``"<method>_only"``.
    """

    targets: str | Sequence[str] = "all-linear"
    parameters: Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] = ()
    layers_pattern: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    bias: str = "none"

    name: ClassVar[str]
    paper: ClassVar[str] = "unpublished"
    """Title and arXiv number."""
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})
    """Site kinds that the method is defined on."""
    dropout_place: ClassVar[Dropout] = Dropout.NONE
    identity_at_init: ClassVar[bool] = True
    acts_at_sites: ClassVar[bool] = True
    """Whether the tensors change a site's computation; a prefix's tensors are only prepended to sequences."""
    truncatable: ClassVar[float | None] = None
    """The power p by which the scale falls with the rank, as r^−p (1 for alpha/r), if the first components are trained
    to work alone; else None."""
    patterned: ClassVar[Mapping[str, str]] = {}
    """Pattern field -> the field that the pattern overrides per module, such as rank_pattern -> r."""

    def __new__(cls, *values: object, **fields: object) -> Self:
        """Refuse positional values and unknown hyper-parameters; the error translates PEFT's names.

        Raises:
            WrongType: the class lacks ``params`` or its formula.
            FormatError: a value is positional or unknown; the error names the hyper-parameter that was probably meant.
        """
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            signature = str(inspect.signature(getattr(cls, missing[0]))).replace("'", "")
            raise WrongType(
                f"the method {cls.__name__} does not define {', '.join(missing)}",
                next_step=f"write `def {missing[0]}{signature}` in the class",
            )
        known = dataclass_fields(cls)
        if values or not fields.keys() <= set(known):
            raise unknown_field_error(cls.__name__, known, _COMMON, values, fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, list | set):
                object.__setattr__(self, spec.name, tuple(value))
        check_fields(self)

    @property
    def trained_method(self) -> Variant:
        """The method whose tensors are trained: the inner one, if this method wraps another."""
        return self

    @property
    def prompt(self) -> PromptVariant | None:
        """This method if its tensors are virtual tokens before a sequence; else None."""
        return self if isinstance(self, PromptVariant) else None

    @property
    def methods(self) -> tuple[Variant, ...]:
        """The methods of which one acts at each site: this method, or all members of a ``Union``."""
        return (self,)

    def method_at(self, path: str) -> Variant:
        """Return the method that acts at a site; its per-module patterns are not applied."""
        return self

    @property
    def settings(self) -> Mapping[str, object]:
        """Every hyper-parameter by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def own_settings(self) -> Mapping[str, object]:
        """The hyper-parameters that not all methods have, by name."""
        return {name: value for name, value in self.settings.items() if name not in _COMMON}

    @property
    def patterns(self) -> Mapping[str, Mapping[str, object]]:
        """The non-empty per-module patterns, by field name."""
        found = {name: value for name, value in self.own_settings.items() if name.endswith("_pattern")}
        return {name: value for name, value in found.items() if isinstance(value, Mapping) and value}

    @property
    def all_targets(self) -> str | Sequence[str]:
        """Everything that ``targets`` and ``parameters`` name."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return (*targets, *self.parameters) if self.parameters else self.targets

    @abstractmethod
    def params(self, site: Site) -> dict[str, ParamSpec]:
        """Return the tensors of one site by name; for a stack of matrices, the tensors of one matrix."""

    def specs(self, site: Site) -> dict[str, ParamSpec]:
        """Return the tensors that an adapter has for a site: ``params``, stacked at a stack of matrices."""
        specs = self.params(site)
        return {name: spec.stacked(site.stack) for name, spec in specs.items()} if site.stack else specs

    def at(self, site: Site) -> Variant:
        """Return ``at_path`` of the site's path."""
        return self.at_path(site.path)

    def at_path(self, path: str) -> Variant:
        """Return this variant with the per-module patterns applied for the site at ``path``."""
        changed = {}
        for pattern_field, target in self.patterned.items():
            patterns = getattr(self, pattern_field)
            if patterns and (key := find_first_pattern(patterns, path)) is not None:
                changed[target] = patterns[key]
        return dataclasses.replace(self, **changed) if changed else self

    def for_model(self, view: ModelView, inputs: object = None) -> Variant:
        """Return this variant for a fresh adapter of a model; the model's structure decides some fields.

        Args:
            inputs: example inputs as ``lorac.compile`` takes them, or None.
        """
        return self

    def adapts(self, site: Site) -> bool:
        """Return whether a targeted site gets an adapter; a method may skip sites, such as all but every k-th block."""
        return True

    def starts_as_base(self, site: Site) -> bool:
        """Return whether a fresh adapter does not change the site's output; for some methods shapes decide."""
        return self.identity_at_init

    def constrained(self, p: Params) -> Mapping[str, Tensor]:
        """Project the tensors of a site that violate the method's constraint; return them by name. Default: none.

        A training call writes them into the adapter before it computes, so that the optimizer continues from them. At a
        stack of matrices each tensor has a leading axis.
        """
        return {}

    def require_class(self) -> None:  # noqa: B027  (only the placeholder of a missing class overrides this)
        """Raise ``UnknownMethod`` if this is a placeholder for a method whose class is not imported."""

    def replaces_module(self, path: str) -> bool:
        """Return whether the method trains and stores the whole module at ``path`` (``LNTuning``)."""
        return False

    def named_sites(self, view: ModelView) -> list[Site]:
        """Return the sites of a model that ``targets`` names by PEFT's rules, of any kind."""
        return select_sites(
            view.sites,
            self.targets,
            parameters=self.parameters,
            exclude=self.exclude,
            layers=self.layers,
            layers_pattern=self.layers_pattern,
            saved=self.modules_to_save,
            heads=view.output_layers,
        )

    def check(self, site: Site) -> None:
        """Raise ``SiteError`` if the method is not defined at the site."""
        if site.kind not in self.kinds:
            raise SiteError(
                f"{self.name} adapts {', '.join(sorted(self.kinds))} sites; '{site.path}' is a {site.kind}",
                next_step="narrow targets=, or add the module to exclude=",
            )
        if site.within is not None and isinstance(self, BranchVariant):
            raise SiteError(
                f"{self.name} reads a layer's input and output; '{site.path}' has neither, since "
                f"'{site.within}' reads its weight in its own forward",
                next_step="narrow targets=, or add the module to exclude=",
            )


class WeightVariant(Variant):
    """A method that edits a weight matrix.

    The formula is a pure function of torch ops; other formulas are refused (``lorac.AdapterError``).
    """

    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS

    @abstractmethod
    def weight(self, W: Tensor, p: Params) -> Tensor:
        """Return W' (out, in) from W (out, in)."""

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        """Return b' (out,) from b (out,), zeros where the base has no bias. Default: b."""
        return b

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        """Return b' for a method whose bias also depends on W (out, in). Default: ``new_bias``."""
        return self.new_bias(b, p)


class BranchVariant(Variant):
    """A method that reads a site's input and output.

    The formula is a pure function of torch ops, as in a ``WeightVariant``.
    """

    emits: ClassVar[tuple[str, ...]] = ()
    """Names of the extra outputs that the formula emits by ``ctx.emit``, once each."""
    learns_from: ClassVar[Mapping[str, str]] = {}
    """Tensor -> the only extra output from which it gets gradients; a loss of the model's outputs does not train it."""
    mixes_tokens: ClassVar[bool] = False
    """Whether a token's output depends on earlier tokens other than by ``Context.attend``. No cache stores the
    formula's values for them, so that generation runs without a cache."""

    samples: ClassVar[bool] = False
    """Whether the formula draws random numbers in training. Then training runs the formula, and other calls its reduced
    form."""
    instead: ClassVar[str] = ""
    """The next step in messages: how to convert the adapter to one with a weight form; may be empty."""

    def reads(self, site: Site) -> tuple[str, ...]:
        """Return the names of the program values that the formula at a site reads by ``ctx.value``.

        ``<module>`` is a module's output in this pass, ``in:<module>`` its input, ``base:<module>`` its output in a
        pass of the unadapted model; ``weight:<site>`` a base weight, ``param:<name>`` a parameter or buffer,
        ``input:<argument>`` an argument of the call, ``own:<name>`` a result of ``once``
        (``lorac.ir.slots.program_values``).
        """
        return ()

    def reads_once(self) -> tuple[str, ...]:
        """Return the names of the program values that ``once`` reads: ``base:``, ``weight:``, ``param:``, ``input:``.

        Also ``pass:<name>:<module>``: that module's output in a pass before the call's main pass. In it only this
        adapter's branches act, at full strength, and see ``ctx.passing`` equal to ``<name>``. A formula whose result
        depends on ``once`` returns a substitute there, such as constant weights of experts. The pass has no gradients,
        and parameters that the adapter replaces keep the base's values.
        """
        return ()

    def once(self, p: Params, ctx: Context) -> Mapping[str, Tensor]:
        """Return the values that all sites share, by name; computed once per call, only while the adapter is active.

        ``p`` has the tensors that ``params`` declares ``shared``; in a method that defines ``once``, ``branch`` gets
        none of these. ``once`` is a pure function of torch ops, as the formula is.
        """
        raise NotImplementedError

    @property
    def has_once(self) -> bool:
        """Whether the method defines ``once``."""
        return type(self).once is not BranchVariant.once

    @abstractmethod
    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        """Return the site's new output y' (…, out) from its input x (…, in) and its output y (…, out)."""


class PromptVariant(Variant):
    """A method that prepends virtual tokens to a sequence. Its only site is the model's input embedding."""

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.EMBEDDING})
    identity_at_init: ClassVar[bool] = False

    def rows(self, p: Params) -> Tensor:
        """Return the embeddings (n, d) of the virtual tokens, or their keys and values; default: the only tensor."""
        [rows] = vars(p).values()
        return rows

    def prefix(self, site: Site, tensors: Mapping[str, Tensor]) -> Prefix:
        """Return the virtual tokens of an adapter from its tensors at this site."""
        return Prefix(site, self.rows(Params(**tensors)))


_COMMON = tuple(Variant.__dataclass_fields__)
"""Names of the hyper-parameters that all methods have."""


def iterate_fields(value: object) -> Iterator[object]:
    """Yield every value in a hyper-parameter, recursively: items of lists and mappings, methods and their fields."""
    if isinstance(value, Variant):
        yield value
        value = value.settings
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for inner in value:
        yield from iterate_fields(inner)


def invocation_of(variant: Variant) -> tuple[int, ...]:
    """Return the token ids from which on a method acts; empty for a method that acts on every token."""
    return tuple(variant.settings.get("invocation_tokens", ()))  # type: ignore[arg-type]  # checked by its class


def dataclass_fields(variant: type[Variant]) -> tuple[str, ...]:
    """Return the names of a variant's hyper-parameters."""
    return tuple(f.name for f in dataclasses.fields(variant))


def is_concrete(value: object) -> bool:
    """Return whether ``value`` is a usable variant class."""
    return inspect.isclass(value) and issubclass(value, Variant) and not inspect.isabstract(value)


_ALIASES = {
    "target_modules": "targets",
    "target_parameters": "parameters",
    "layers_to_transform": "layers",
    "rank": "r",
}
"""Name in PEFT or in common use -> lorac's name."""
_SUFFIX = "_modules"
"""Suffix of some of PEFT's names, and of none of lorac's."""


def translate_name(name: str, known: Collection[str]) -> str | None:
    """Return lorac's name for a hyper-parameter that another library calls ``name``; None if there is none.

    PEFT prefixes some names with the method's name.
    """
    _, _, rest = name.partition("_")
    return next((own for own in (_ALIASES.get(name), rest, name.removesuffix(_SUFFIX)) if own in known), None)


def unknown_field_error(
    method: str, known: Sequence[str], common: Collection[str], values: Sequence[object], fields: Mapping[str, object]
) -> FormatError:
    """Return the error for unknown or positional hyper-parameters; it suggests the call that was probably meant.

    Args:
        method: the name of the method's class.
        known: the names of the method's hyper-parameters, in order.
        common: the names of the hyper-parameters that all methods have.
        values: the positional arguments.
        fields: the keyword arguments.
    """
    unknown = next((name for name in fields if name not in known), None)
    if unknown is None:
        own = [name for name in known if name not in common]
        call = _format_call(method, [*zip(own, values, strict=False), *fields.items()])
        return FormatError(
            f"{method} takes its hyper-parameters by name", next_step=f"write {call}", code="unknown_field"
        )
    translated = {name: name if name in known else translate_name(name, known) for name in fields}
    complete = None not in translated.values() and not values
    call = _format_call(method, [(translated[name] or name, value) for name, value in fields.items()])
    return FormatError(
        f"{method} has no hyper-parameter '{unknown}'",
        nearest=translated[unknown] or nearest_name(unknown, known),
        next_step=f"write {call}" if complete else f"it has {', '.join(known)}",
        code="unknown_field",
    )


def _format_call(method: str, arguments: Sequence[tuple[str, object]]) -> str:
    return f"{method}({', '.join(f'{name}={short(value)}' for name, value in arguments)})"
