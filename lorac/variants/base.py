"""The base classes of methods: hyper-parameters, the tensors of a site, and one formula.

Every concrete method is a final, frozen dataclass in a file of its own in this folder. It writes ``params`` and one
formula; merging, unmerging, saving, exporting and counting are derived. All that a method needs is imported from here.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from lorac.argument_types import check_fields
from lorac.errors import SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites.patterns import find_first_pattern, select_sites
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.ir.slots.prefix import Prefix
from lorac.variants._field_names import unknown_field_error
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
    """The surroundings of a branch's formula, and all that it may use besides its arguments.

    Attributes:
        training: whether the model trains.
        passing: the name of the pass that the formula runs in (``BranchVariant.reads_once``), empty in the call's own.
            In a named pass, values of ``once`` do not exist yet.
    """

    training: bool
    passing: str

    @property
    def site(self) -> Site:
        """The site whose output the formula changes."""

    @property
    def generator(self) -> torch.Generator | None:
        """In training a random generator, seeded anew for every call and alike at all sites; else None."""

    def value(self, name: str) -> Tensor:
        """Return a value of the program, such as a hidden state of the base pass."""

    def emit(self, name: str, tensor: Tensor) -> None:
        """Give an extra output, filed under ``name`` and the site's path."""

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
        """Return attention over the call's tokens, and over cached ones before them: (batch, length, heads, size).

        The model's cache stores the keys and values next to its own.

        Args:
            q: queries (batch, heads, length, size).
            k, v: keys and values (batch, heads of keys, length, size); groups of query heads share one of them.
            causal: whether tokens attend to earlier tokens and themselves only; a cache allows nothing else.
            mask: which tokens are not padding (batch, length), as the call gives it; each token attends to itself.
            scale: factor of the scores. Default: 1/√size.
        """


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """The hyper-parameters common to all methods, in PEFT's names without the method's prefix.

    Attributes:
        targets: as PEFT's ``target_modules``: suffixes, one regular expression or ``"all-linear"``; also
            ``"all-conv"``, and ``"all-blocks"`` for methods on blocks.
        parameters: PEFT's ``target_parameters``: matrices that modules multiply in their own forward (experts'
            weights), by the ends of their names.
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
    """Whether its tensors change a site's computation; those of a prefix stand before the sequences alone."""
    truncatable: ClassVar[float | None] = None
    """The power p by which the scale falls with the rank, as r^−p (1 for alpha/r), for a method whose first components
    are trained to stand alone; else None."""
    patterned: ClassVar[Mapping[str, str]] = {}
    """Pattern field -> the field that it overrides per module, such as rank_pattern -> r."""

    def __new__(cls, *values: object, **fields: object) -> Self:
        """Refuse positional values and unknown hyper-parameters; the message translates PEFT's names.

        Raises:
            FormatError: naming the hyper-parameter that is probably meant.
        """
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
        """This method, where its tensors are virtual tokens before a sequence; else None."""
        return self if isinstance(self, PromptVariant) else None

    @property
    def methods(self) -> tuple[Variant, ...]:
        """The methods that act, one of them at each site: this one, or all members of a ``Union``."""
        return (self,)

    def method_at(self, path: str) -> Variant:
        """Return the method that acts at a site, without its per-module patterns."""
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
        """The non-empty per-module patterns, by the name of their field."""
        found = {name: value for name, value in self.own_settings.items() if name.endswith("_pattern")}
        return {name: value for name, value in found.items() if isinstance(value, Mapping) and value}

    @property
    def all_targets(self) -> str | Sequence[str]:
        """Everything that ``targets`` and ``parameters`` name."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return (*targets, *self.parameters) if self.parameters else self.targets

    @abstractmethod
    def params(self, site: Site) -> dict[str, ParamSpec]:
        """Return the tensors of one site by name; for stacked matrices, those of one matrix."""

    def specs(self, site: Site) -> dict[str, ParamSpec]:
        """Return the tensors that an adapter holds for a site: those of ``params``, stacked where the site is."""
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
        """Return this variant for a fresh adapter of a model, with the fields that the model's structure decides.

        Args:
            inputs: example inputs as ``lorac.compile`` takes them, if given.
        """
        return self

    def adapts(self, site: Site) -> bool:
        """Return whether a targeted site gets an adapter; a method may skip some, such as all but every k-th block."""
        return True

    def starts_as_base(self, site: Site) -> bool:
        """Return whether a fresh adapter leaves the site's output as it is; for some methods shapes decide."""
        return self.identity_at_init

    def constrained(self, p: Params) -> Mapping[str, Tensor]:
        """Return the tensors of a site that leave the method's constraint, moved back onto it, by name; default: none.

        A call that trains writes them into the adapter before it computes, so that the optimizer goes on from there.
        At a stack of matrices each tensor has a leading axis.
        """
        return {}

    def require_class(self) -> None:  # noqa: B027  (only the placeholder of a missing class overrides it)
        """Raise ``UnknownMethod`` if this is a placeholder for a method whose class is not imported."""

    def replaces_module(self, path: str) -> bool:
        """Return whether the method itself trains and stores the whole module at ``path`` (``LNTuning``)."""
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
        """Raise ``SiteError`` where the method is not defined on the site."""
        if site.kind not in self.kinds:
            raise SiteError(
                f"{self.name} adapts {', '.join(sorted(self.kinds))} sites; '{site.path}' is a {site.kind}",
                next_step="narrow targets=, or exclude= the module",
            )
        if site.within is not None and isinstance(self, BranchVariant):
            raise SiteError(
                f"{self.name} reads a layer's input and output; '{site.path}' has neither, since "
                f"'{site.within}' reads its weight in its own forward",
                next_step="narrow targets=, or exclude= the module",
            )


class WeightVariant(Variant):
    """A method that edits a weight matrix.

    Its formula is a pure function of torch ops; other formulas are refused (``lorac.AdapterError``).
    """

    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS

    @abstractmethod
    def weight(self, W: Tensor, p: Params) -> Tensor:
        """Return W' (out, in) from W (out, in)."""

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        """Return b' (out,) from b (out,), zeros where the base has no bias. Default: b."""
        return b

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        """Return b' of a method whose bias depends on W (out, in), too. Default: ``new_bias``."""
        return self.new_bias(b, p)


class BranchVariant(Variant):
    """A method that reads a site's input and output.

    Its formula is a pure function, as that of a ``WeightVariant``.
    """

    emits: ClassVar[tuple[str, ...]] = ()
    """Names of the extra outputs that the formula gives through ``ctx.emit``, each once."""
    learns_from: ClassVar[Mapping[str, str]] = {}
    """Tensor -> the extra output from which alone it gets gradients; no loss of the model's outputs trains it."""
    mixes_tokens: ClassVar[bool] = False
    """Whether a token's output depends on earlier tokens other than by ``Context.attend``. No cache stores the
    formula's values for them, so generation runs without one."""

    samples: ClassVar[bool] = False
    """Whether the formula draws random numbers in training. Such a call runs it as it is; others its reduced form."""
    instead: ClassVar[str] = ""
    """The next step in messages: how to get an adapter with a weight form in place of this one; may be empty."""

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

        Also ``pass:<name>:<module>``: that module's output in a pass before the call's own. In it only this adapter's
        branches act, at full strength, and see ``ctx.passing`` equal to ``<name>``. A formula whose result depends on
        ``once`` gives a substitute there, such as constant weights of experts. The pass has no gradients, and
        parameters that the adapter replaces are the base's.
        """
        return ()

    def once(self, p: Params, ctx: Context) -> Mapping[str, Tensor]:
        """Return the values that all sites share, by name; computed once per call, and only while the adapter is on.

        ``p`` holds the tensors that ``params`` declares ``shared``; ``branch`` gets none of these in a method that
        defines ``once``. It is a pure function of torch ops, as the formula is.
        """
        raise NotImplementedError

    @property
    def has_once(self) -> bool:
        """Whether the method defines ``once``."""
        return type(self).once is not BranchVariant.once

    @abstractmethod
    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        """Return the whole new output y' (…, out) from the input x (…, in) and the output y (…, out)."""


class PromptVariant(Variant):
    """A method that puts virtual tokens before a sequence. Its one site is the model's input embedding."""

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.EMBEDDING})
    identity_at_init: ClassVar[bool] = False

    def rows(self, p: Params) -> Tensor:
        """Return the embeddings (n, d) of the virtual tokens, or their keys and values; default: the only tensor."""
        [rows] = vars(p).values()
        return rows

    def prefix(self, site: Site, tensors: Mapping[str, Tensor]) -> Prefix:
        """Return the virtual tokens of an adapter's tensors at that site."""
        return Prefix(site, self.rows(Params(**tensors)))


_COMMON = tuple(Variant.__dataclass_fields__)
"""Names of the hyper-parameters that all methods have."""


def iterate_fields(value: object) -> Iterator[object]:
    """Yield everything in a hyper-parameter, recursively: items of lists and mappings, methods and their fields."""
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
    """Return the token ids from which on a method acts; empty for one that acts on every token."""
    return tuple(variant.settings.get("invocation_tokens", ()))  # type: ignore[arg-type]  # checked by its class


def dataclass_fields(variant: type[Variant]) -> tuple[str, ...]:
    """Return the names of a variant's hyper-parameters."""
    return tuple(f.name for f in dataclasses.fields(variant))


def is_concrete(value: object) -> bool:
    """Return whether ``value`` is a usable variant class."""
    return inspect.isclass(value) and issubclass(value, Variant) and not inspect.isabstract(value)
