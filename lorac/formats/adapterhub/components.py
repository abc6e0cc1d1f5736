"""What a configuration comes to at a model: the methods of a file, where their tensors lie, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lorac.errors import FormatError, nearest_name, short
from lorac.formats.adapterhub.keys import Found, KeyPattern
from lorac.formats.adapterhub.layouts import AdaptableLayer, Family, layers_in, sublayers_in
from lorac.frontend.model_view import ModelView
from lorac.frontend.residual_stream import ResidualStream, Sublayer, find_sublayer_sites, trace_residual_stream
from lorac.ir.sites import Site
from lorac.variants.base import Variant

Tensor = torch.Tensor


@dataclass(frozen=True)
class ConfigHeader:
    """What a file says around its configuration.

    Attributes:
        file: where, for messages.
        name: what the keys of its tensors call the adapter.
        model_type: of the model it was trained on.
        own_class: whether that was of one of the library's own classes, with heads.
        versioned: whether it says by which version it was written; the first ones did not.
        task: whether it is one of the first versions' adapters for a task, and holds no invertible adapter.
    """

    file: Path
    name: str
    model_type: Any
    own_class: bool
    versioned: bool
    task: bool


@dataclass(frozen=True)
class ModelLayout:
    """A model, and what of it places are found by.

    Attributes:
        model: the model.
        sites: all of its sites, by path.
        stream: what it adds to its hidden states.
        sublayers: by the path of the site that stands for each.
        sublayer_places: site path -> what a file calls the place, of sublayers.
        layers: site path -> a layer that a file may adapt.
    """

    view: ModelView
    model: nn.Module
    sites: Mapping[str, Site]
    stream: ResidualStream
    sublayers: Mapping[str, Sublayer]
    sublayer_places: Mapping[str, str]
    layers: Mapping[str, AdaptableLayer]

    @classmethod
    def of(cls, model: nn.Module, family: Family) -> ModelLayout:
        """The model's places by what its family calls them.

        Raises:
            ExampleInputsNeeded, CaptureError: as ``stream_of``.
        """
        view = ModelView.of(model)
        sites, stream = view.sites, trace_residual_stream(view)
        sublayers = find_sublayer_sites(view, stream)
        places = sublayers_in(family, stream, sublayers)
        return cls(view, model, sites, stream, sublayers, places, layers_in(family, stream, sites))


@dataclass(frozen=True)
class PlacedComponent:
    """What one configuration comes to at a model.

    Attributes:
        variants: its methods, each with its sites.
        places: where the tensors lie.
        made: (site path, what lies in the file for it) -> its tensors.
    """

    variants: tuple[Variant, ...]
    places: tuple[KeyPattern, ...]
    made: Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]

    def tensors(self, found: Found) -> dict[str, dict[str, Tensor]]:
        """Site path -> its tensors, of what ``placed`` found."""
        paths = dict.fromkeys(path for place in self.places for path in place.paths)
        return {path: self.made(path, found[path]) for path in paths}


class ComponentConfig(Protocol):
    """A configuration that was read, before it meets a model."""

    def placed(self, host: ModelLayout, name: str) -> PlacedComponent:
        """What it comes to at a model, for an adapter of a name.

        Raises:
            FormatError: it means something there that lorac does not build.
        """


@dataclass(frozen=True)
class ComponentFile:
    """What a method comes to in a file.

    Attributes:
        config: the configuration.
        places: where its tensors lie.
        tensors: what lies there.
        own_class: whether only one of the library's own classes computes it.
    """

    config: Mapping[str, Any]
    places: tuple[KeyPattern, ...]
    tensors: Found
    own_class: bool = False


def refuse_unknown(fields: Mapping[str, Any], known: Iterable[str], file: Path) -> None:
    """Refuse fields that the library does not have.

    Raises:
        FormatError: naming the first.
    """
    names = set(known)
    for name in fields:
        if name not in names:
            raise FormatError(
                f"'{file}' sets the unknown field '{name}' = {short(fields[name])}",
                nearest=nearest_name(name, names),
                next_step="it may change the result, so it is not ignored; "
                "if it is from a newer library, a newer lorac may know it",
                code="unknown_field",
            )
