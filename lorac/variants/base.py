"""What a method is: hyper-parameters, the tensors it needs at a site, and one formula.

Two abstract bases. Every concrete class is final, is a frozen dataclass, sits in its own file in this folder, and
writes ``params`` and one formula; nothing else (merging, unmerging, saving, exporting, counting) is written per method.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from lorac.errors import SiteUnsupported
from lorac.ir.patterns import first_match
from lorac.ir.sites import Site
from lorac.ir.types import Dropout, Params, ParamSpec, SiteKind

Tensor = torch.Tensor
MATRIX_KINDS = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D, SiteKind.EMBEDDING})


class Context(Protocol):
    """What a branch may ask for, and nothing else."""

    training: bool
    site: Site
    generator: torch.Generator | None

    def value(self, name: str) -> Tensor:
        """A value of the program, such as a base pass's hidden state."""

    def emit(self, name: str, tensor: Tensor) -> None:
        """Give an extra output, kept under ``name`` and the site's path."""


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """Hyper-parameters common to all methods, in PEFT's names without the method's prefix.

    Attributes:
        targets: what PEFT's ``target_modules`` takes: suffixes, one regular expression, ``"all-linear"``; or
            ``"all-blocks"``, for methods on blocks.
        exclude: PEFT's ``exclude_modules``.
        layers: PEFT's ``layers_to_transform``: layer indices to keep.
        layers_pattern: PEFT's ``layers_pattern``: name of the list of layers.
        modules_to_save: modules trained and stored whole, beside the adapter.
        bias: which of the base's biases are trained: ``"none"``, ``"all"`` or the method's ``"<method>_only"``.
    """

    targets: str | tuple[str, ...] = "all-linear"
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

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, list | set):
                object.__setattr__(self, spec.name, tuple(value))

    @abstractmethod
    def params(self, site: Site) -> dict[str, ParamSpec]:
        """The tensors of one site, by name."""

    def at(self, site: Site) -> Variant:
        """This variant with the per-module patterns applied for ``site``."""
        return self.at_path(site.path)

    def at_path(self, path: str) -> Variant:
        """The same for a site of which only the path is known."""
        changed = {}
        for pattern_field, target in self.patterned.items():
            patterns = getattr(self, pattern_field)
            key = first_match(patterns, path)
            if key is not None:
                changed[target] = patterns[key]
        return dataclasses.replace(self, **changed) if changed else self

    def adapts(self, site: Site) -> bool:
        """Whether a site that ``targets`` names gets an adapter; a method may skip some (every k-th block, say)."""
        return True

    def copies(self, path: str) -> bool:
        """Whether the module at ``path`` is trained and stored whole, by the method itself (``LNTuning``)."""
        return False

    def check(self, site: Site) -> None:
        """Raise ``SiteUnsupported`` where the method is not defined on the site's kind."""
        if site.kind not in self.kinds:
            raise SiteUnsupported(
                f"{self.name} adapts {', '.join(sorted(self.kinds))} sites; '{site.path}' is a {site.kind}",
                next_step="narrow targets=, or exclude= the module",
            )


class WeightVariant(Variant):
    """A method that edits a weight matrix."""

    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS

    @abstractmethod
    def weight(self, W: Tensor, p: Params) -> Tensor:
        """W' (out, in) from W (out, in)."""

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        """b' (out,) from b (out,); zeros where the base has none. Default: the base's."""
        return b


class BranchVariant(Variant):
    """A method that reads a site's input and output."""

    emits: ClassVar[tuple[str, ...]] = ()
    """Names of the extra outputs the formula gives through ``ctx.emit``, each once."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the program values the formula asks for through ``ctx.value`` (``lorac.ir.values``)."""
        return ()

    @abstractmethod
    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        """y' (…, out) from x (…, in) and y (…, out); y' is the whole new output."""


class ProgramVariant(Variant):
    """A method that rewrites the program itself; the last resort, for side networks and text projectors."""

    @abstractmethod
    def rewrite(self, program: Any) -> Any:
        """Program -> Program."""


@dataclass(eq=False)
class Adapter:
    """An adapter: a name, a variant, the sites it targets, and its tensors.

    Attributes:
        name: how ``swap`` calls it.
        variant: the method and its hyper-parameters.
        tensors: site path -> parameter name -> tensor, in the matrix convention. Parameters shared by all sites are
            the same tensor object at each.
        replaced: fully qualified parameter name -> the tensor that takes its place (modules_to_save, trained biases).
        provenance: where it came from, and what its file recorded (base hash, format, original configuration).
    """

    name: str
    variant: Variant
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the sites it adapts, in order."""
        return tuple(self.tensors)

    def parameters(self) -> Iterable[Tensor]:
        """Every distinct tensor of the adapter."""
        own = [tensor for at in self.tensors.values() for tensor in at.values()]
        return {id(tensor): tensor for tensor in (*own, *self.replaced.values())}.values()

    def numel(self) -> int:
        """Number of stored values, shared tensors counted once."""
        return sum(t.numel() for t in self.parameters())


def dataclass_fields(variant: type[Variant]) -> tuple[str, ...]:
    """Names of a variant's hyper-parameters."""
    return tuple(f.name for f in dataclasses.fields(variant))


def is_concrete(value: object) -> bool:
    """Whether ``value`` is a usable variant class."""
    return inspect.isclass(value) and issubclass(value, Variant) and not inspect.isabstract(value)


Formula = Callable[..., Tensor]
