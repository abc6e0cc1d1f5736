"""What a method is: hyper-parameters, the tensors it needs at a site, and one formula.

Two abstract bases. Every concrete class is final, is a frozen dataclass, sits in its own file in this folder, and
writes ``params`` and one formula; nothing else (merging, unmerging, saving, exporting, counting) is written per method.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch

from lorac.argument_types import check_fields
from lorac.errors import SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.reduction import Params
from lorac.ir.patterns import find_first_pattern, select_sites
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.variants._field_names import unknown_field_error
from lorac.variants.params import ParamSpec

Tensor = torch.Tensor
MATRIX_KINDS = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D, SiteKind.EMBEDDING})


class Context(Protocol):
    """What a branch may ask for, and nothing else.

    Attributes:
        training: whether the host trains.
        site: the site.
        passing: empty in the call's own pass; in one that the method has before it (``BranchVariant.reads_once``), its
            name. What ``once`` computes is not there yet.
    """

    training: bool
    site: Site
    passing: str

    @property
    def generator(self) -> torch.Generator | None:
        """In training a source of randomness, seeded anew for every call, at all sites alike; else None."""

    def value(self, name: str) -> Tensor:
        """A value of the program, such as a base pass's hidden state."""

    def emit(self, name: str, tensor: Tensor) -> None:
        """Give an extra output, kept under ``name`` and the site's path."""

    def positions(self, x: Tensor) -> Tensor:
        """Where the tokens of x (batch, length, features) are in their texts: what broadcasts to (batch, length).

        Of a text that grows the call has only what is new, and they count on from what a cache holds.
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
        """Attention among a call's tokens, and to those before them where the text grows: (batch, length, heads, size).

        A cache of the host's keeps keys and values of this one beside its own.

        Args:
            q: queries (batch, heads, length, size).
            k, v: keys and values (batch, heads of keys, length, size); so many heads of q share one of theirs.
            causal: whether a token attends to none that come after it; text grows by such attention alone.
            mask: what is no padding (batch, length), as the call gives it; each token sees itself in any case.
            scale: what the scores are multiplied by. Default: 1/√size.
        """


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """Hyper-parameters common to all methods, in PEFT's names without the method's prefix.

    Attributes:
        targets: what PEFT's ``target_modules`` takes: suffixes, one regular expression, ``"all-linear"``; or
            ``"all-conv"``; or ``"all-blocks"``, for methods on blocks.
        parameters: PEFT's ``target_parameters``: matrices that modules multiply by themselves (experts' weights), by
            the ends of their names.
        exclude: PEFT's ``exclude_modules``.
        layers: PEFT's ``layers_to_transform``: layer indices to keep.
        layers_pattern: PEFT's ``layers_pattern``: name of the list of layers.
        modules_to_save: modules trained and stored whole, beside the adapter.
        bias: which of the base's biases are trained: ``"none"``, ``"all"`` or the method's ``"<method>_only"``.
    """

    targets: str | tuple[str, ...] = "all-linear"
    parameters: tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"

    name: ClassVar[str]
    paper: ClassVar[str] = "unpublished"
    """Title and arXiv number."""
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})
    """Site kinds the method is defined on."""
    dropout_place: ClassVar[Dropout] = Dropout.NONE
    identity_at_init: ClassVar[bool] = True
    truncatable: ClassVar[float | None] = None
    """Of a method trained so that the first components of its rank stand alone: the power p by which its scale falls
    with the rank, as r^−p (1 for alpha/r); None where they do not stand alone."""
    patterned: ClassVar[Mapping[str, str]] = {}
    """Pattern field -> the field it overrides per module, such as rank_pattern -> r."""

    def __new__(cls, *values: object, **fields: object) -> Self:
        """Refuse what is no hyper-parameter, or is given without its name; what PEFT calls otherwise is known.

        Raises:
            FormatError: naming the hyper-parameter that is meant, where one is.
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
    def trained(self) -> Variant:
        """The method whose tensors are trained: of one that stands around another, the inner one."""
        return self

    @property
    def methods(self) -> tuple[Variant, ...]:
        """The methods that act, at every site one of them: this one, or of several held together (``Union``) each."""
        return (self,)

    def method_at(self, path: str) -> Variant:
        """The one of them that acts at a site, as it was given."""
        return self

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every hyper-parameter by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def own_settings(self) -> Mapping[str, Any]:
        """Those of them that not all methods have."""
        return {name: value for name, value in self.settings.items() if name not in _COMMON}

    @property
    def patterns(self) -> Mapping[str, Any]:
        """Those of them that say something of single sites, where they do."""
        return {name: value for name, value in self.own_settings.items() if name.endswith("_pattern") and value}

    @property
    def asked(self) -> str | tuple[str, ...]:
        """All that ``targets`` and ``parameters`` name."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return (*targets, *self.parameters) if self.parameters else self.targets

    @abstractmethod
    def params(self, site: Site) -> dict[str, ParamSpec]:
        """The tensors of one site, by name; of stacked matrices those of one of them."""

    def specs(self, site: Site) -> dict[str, ParamSpec]:
        """The tensors that an adapter holds for a site: those of ``params``, of stacked matrices each one's."""
        specs = self.params(site)
        return {name: spec.stacked(site.stack) for name, spec in specs.items()} if site.stack else specs

    def at(self, site: Site) -> Variant:
        """This variant with the per-module patterns applied for ``site``."""
        return self.at_path(site.path)

    def at_path(self, path: str) -> Variant:
        """The same for a site of which only the path is known."""
        changed = {}
        for pattern_field, target in self.patterned.items():
            patterns = getattr(self, pattern_field)
            key = find_first_pattern(patterns, path)
            if key is not None:
                changed[target] = patterns[key]
        return dataclasses.replace(self, **changed) if changed else self

    def for_model(self, view: ModelView, inputs: object = None) -> Variant:
        """This variant as a fresh adapter of a model has it; a method may settle here what the structure tells.

        Args:
            view: the model; only read.
            inputs: example inputs as ``lorac.compile`` takes them, where they were given.
        """
        return self

    def adapts(self, site: Site) -> bool:
        """Whether a site that ``targets`` names gets an adapter; a method may skip some (every k-th block, say)."""
        return True

    def starts_as_base(self, site: Site) -> bool:
        """Whether a fresh adapter answers what the base does at a site; a method may not at layers of some shapes."""
        return self.identity_at_init

    def require_class(self) -> None:  # noqa: B027  (a class is what a method is; only what stands for one lacks it)
        """Raise ``UnknownMethod`` where this stands for a method whose class is not imported."""

    def copies(self, path: str) -> bool:
        """Whether the module at ``path`` is trained and stored whole, by the method itself (``LNTuning``)."""
        return False

    def named_sites(self, view: ModelView) -> list[Site]:
        """The sites of a model that ``targets`` names, by PEFT's rules, of whatever kind."""
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
                code="site_unsupported",
            )
        if site.within is not None and isinstance(self, BranchVariant):
            raise SiteError(
                f"{self.name} reads a layer's input and output, and '{site.path}' has neither: "
                f"'{site.within}' computes with its weight itself",
                next_step="narrow targets=, or exclude= the module",
                code="site_unsupported",
            )


class WeightVariant(Variant):
    """A method that edits a weight matrix.

    Its formula is a pure function of torch ops; one that is not is refused (``lorac.AdapterError``).
    """

    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS

    @abstractmethod
    def weight(self, W: Tensor, p: Params) -> Tensor:
        """W' (out, in) from W (out, in)."""

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        """b' (out,) from b (out,); zeros where the base has none. Default: the base's."""
        return b


class BranchVariant(Variant):
    """A method that reads a site's input and output.

    Its formula is pure as a ``WeightVariant``'s is.
    """

    emits: ClassVar[tuple[str, ...]] = ()
    """Names of the extra outputs the formula gives through ``ctx.emit``, each once."""
    mixes_tokens: ClassVar[bool] = False
    """Whether what a token gets depends on those before it, otherwise than by ``Context.attend``: no cache holds what
    the formula made of these, so text is generated without one."""

    instead: ClassVar[str] = ""
    """What has a weight form in the place of one of its adapters, as a next step of messages; empty: nothing has."""

    def reads(self, site: Site) -> tuple[str, ...]:
        """Names of the program values that the formula at a site asks for through ``ctx.value``.

        ``<module>`` is a module's output in this pass, ``in:<module>`` its input, ``base:<module>`` its output in a
        pass of the unadapted model; ``weight:<site>`` a base weight, ``param:<name>`` a parameter or buffer,
        ``input:<argument>`` what the call gives forward, ``own:<name>`` what ``once`` computed
        (``lorac.ir.slots.program_values``).
        """
        return ()

    def reads_once(self) -> tuple[str, ...]:
        """The same for ``once``, which may read ``base:``, ``weight:``, ``param:`` and ``input:``.

        And ``pass:<name>:<module>``: that module's output in a pass before the call's own, in which nothing but this
        adapter's branches act, whole, and are asked with ``ctx.passing`` equal to ``<name>``. So a formula that what
        it reads depends on is asked for what stands in its place there: a constant for what is routed, say. The pass
        has no gradients; what the adapter replaces whole is the base's in it.
        """
        return ()

    def once(self, p: Params, ctx: Context) -> Mapping[str, Tensor]:
        """What is the same at all sites, by name; computed once per call, and not at all while the adapter is off.

        ``p`` has the tensors that ``params`` gives as ``shared``, of which a method that computes something once hands
        none to ``branch``. A pure function of torch ops, as the formula is.
        """
        raise NotImplementedError

    @property
    def has_once(self) -> bool:
        """Whether the method computes something once per call."""
        return type(self).once is not BranchVariant.once

    @abstractmethod
    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        """y' (…, out) from x (…, in) and y (…, out); y' is the whole new output."""


_COMMON = tuple(Variant.__dataclass_fields__)
"""Names of the hyper-parameters that all methods have."""


def iterate_fields(value: object) -> Iterator[object]:
    """What lies in a hyper-parameter, however deep: items of lists and mappings, methods, and what lies in those."""
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


def dataclass_fields(variant: type[Variant]) -> tuple[str, ...]:
    """Names of a variant's hyper-parameters."""
    return tuple(f.name for f in dataclasses.fields(variant))


def is_concrete(value: object) -> bool:
    """Whether ``value`` is a usable variant class."""
    return inspect.isclass(value) and issubclass(value, Variant) and not inspect.isabstract(value)


Formula = Callable[..., Tensor]
