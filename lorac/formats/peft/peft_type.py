"""What a PEFT type is to lorac: tables of its configuration fields and of its keys."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.ir.sites import Site
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensors = Mapping[str, torch.Tensor]


class FieldUse(enum.Enum):
    """What a configuration field is to a compiled adapter."""

    APPLIED = "applied"
    """It changes what is computed, and lorac does so."""
    TRAINING = "training only"
    """It matters while training: the trained tensors hold all that is left of it."""
    IRRELEVANT = "irrelevant"
    """It changes no number."""
    REFUSED = "refused"
    """Away from its default it changes what is computed, in a way that lorac does not build."""


ABSENT: Any = object()
"""Default of a field that PEFT has, but never writes."""


def as_is(value: Any) -> Any:
    """The value unchanged."""
    return value


@dataclass(frozen=True)
class Field:
    """One field of a PEFT configuration.

    Attributes:
        use: What it is to lorac.
        default: PEFT's default.
        to: The variant's field that it sets, if any.
        read: File's value -> lorac's; raises ValueError saying what was expected.
        write: The variant's value -> the file's.
        instead: What to do about a refused value, or about one that `read` refuses.
        kept: Of no consequence to lorac, but written back as it was read.
    """

    use: FieldUse
    default: Any = None
    to: str | None = None
    read: Callable[[Any], Any] = as_is
    write: Callable[[Any], Any] = as_is
    instead: str | None = None
    kept: bool = False


@dataclass(frozen=True)
class ExpertFolders:
    """What is written of an adapter whose file holds no tensors of sites.

    Attributes:
        tensors: The file's, by key.
        experts: Name -> an adapter in a folder of its own within.
        paths: The field of the configuration that says where those are.
    """

    tensors: Tensors
    experts: Mapping[str, Adapter]
    paths: str


@dataclass(frozen=True)
class PeftType:
    """One PEFT type. A module of `types` defines it as `METHOD`.

    Attributes:
        peft_type: As the configuration names it.
        variants: The method's class -> the configuration values that pick it.
        only_read: Those of them that PEFT itself does not compute: files of a fork are read, and none is written.
        fields: Every field of PEFT's configuration class.
        retired: Fields that older releases of PEFT wrote, or forks do.
        suffixes: What follows a site's path in a key.
        shared: Names of tensors that all sites have in common, in the file and as parameters:
            `base_model.<name>`, and in older files once more at every site.
        crossed: Of a type that can tie the output layer to the embedding it adapts, parameters of that -> those of the
            embedding that they are, transposed.
        copied: What stands between a module's path and its parameters' names, of a type that trains whole copies
            of the targeted modules (`Variant.copies`).
        make_shared: (configuration, the model's sites that the file names) -> the shared tensors of
            a file that left them out because a seed tells them; none where it promises them.
        make_site: (variant, the model's site, tensors by parameter, as read) -> the same with those that no file of the
            type holds, because the configuration and the site tell them. Reading then needs the model.
        spread: (the file's tensors by site, the model's sites) -> sites that are tied to one of the file's, and with
            that have the same tensors in PEFT -> that one.
        shared_shapes: (variant, all sites) -> the shapes that PEFT gives the shared tensors, where they
            are not those that the sites ask for: saving pads and cuts to them.
        training_state: Mark in a key -> field that accounts for it: state of the training alone.
        read_site: (variant, path, file's tensors by suffix) -> the site as the file tells it, and
            the tensors by parameter in the matrix convention.
        lays_out: The file's shapes tell kind and kernel of a site, to be held against the model's.
        check_site: (site of the model, tensors by parameter): what only the model can tell.
        write_site: (variant, site, tensors by parameter) -> the file's tensors by suffix.
        read_inner: (configuration, tensors by parameter) -> the tensors as they count, of a layer that PEFT adapts with
            the module that reads its weight (keys under <site>.base_layer).
        start: Field that says how an adapter began, where some ways rewrite the base.
        begun: (adapter as read, configuration, model or None) -> the adapter over the base as it was before its start.
        converted: Methods that PEFT has no type for, and whose adapters are exactly ones of this type -> how.
        read_whole: (folder, configuration, the file's tensors, name, model or None) -> the adapter, of a type whose
            file holds no tensors of sites.
        write_whole: (adapter, model or None) -> what is written of it, of such a type.
        settled: (variant, tensors by site and suffix) -> the variant as the tensors tell it, where they know better
            than the configuration.
    """

    peft_type: str
    variants: Mapping[type[Variant], Mapping[str, Any]]
    fields: Mapping[str, Field]
    suffixes: tuple[str, ...]
    read_site: Callable[[Variant, str, Tensors], tuple[Site, dict[str, torch.Tensor]]]
    write_site: Callable[[Variant, Site, Tensors], dict[str, torch.Tensor]]
    read_inner: Callable[[Mapping[str, Any], dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda _, tensors: (
        tensors
    )
    settled: Callable[[Variant, Mapping[str, Tensors]], Variant] = lambda variant, sites: variant
    start: str | None = None
    begun: Callable[[Adapter, Mapping[str, Any], nn.Module | None], Adapter] = lambda adapter, values, model: adapter
    converted: Mapping[type[Variant], Callable[[Adapter], Adapter]] = field(default_factory=dict)
    read_whole: Callable[[Path, Mapping[str, Any], Tensors, str, nn.Module | None], Adapter] | None = None
    write_whole: Callable[[Adapter, nn.Module | None], ExpertFolders] | None = None
    lays_out: bool = True
    only_read: frozenset[type[Variant]] = frozenset()
    check_site: Callable[[Site, Tensors], None] = lambda site, tensors: None
    shared: tuple[str, ...] = ()
    make_site: Callable[[Variant, Site, Tensors], dict[str, torch.Tensor]] | None = None
    spread: Callable[[Mapping[str, Tensors], Mapping[str, Site]], dict[str, str]] | None = None
    crossed: Mapping[str, str] = field(default_factory=dict)
    copied: str | None = None
    make_shared: Callable[[Mapping[str, Any], Sequence[Site]], dict[str, torch.Tensor]] | None = None
    shared_shapes: Callable[[Variant, Sequence[Site]], Mapping[str, tuple[int, ...]]] | None = None
    retired: Mapping[str, Field] = field(default_factory=dict)
    training_state: Mapping[str, str] = field(default_factory=dict)

    def tied_to(self, embedding: Tensors) -> dict[str, torch.Tensor]:
        """What an output layer holds that is tied to an embedding of these tensors; nothing where the type ties none.

        PEFT adapts lm_head, tied by ensure_weight_tying to an embedding with A (r, V) and B (d, r), by Bᵀ and Aᵀ, and
        saves both (peft.tuners.lora.model).
        """
        if not embedding.keys() >= set(self.crossed.values()):
            return {}
        return {own: embedding[other].t() for own, other in self.crossed.items()}
