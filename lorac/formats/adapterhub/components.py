"""Components of an AdapterHub file: one configuration each, with the places of its tensors in a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats.adapterhub.keys import KeyPattern, TensorsBySite
from lorac.formats.adapterhub.layouts import AdaptableLayer, Family, find_layers, name_sublayers
from lorac.frontend.model_view import ModelView
from lorac.frontend.residual_stream import ResidualStream, Sublayer, find_sublayer_sites, trace_residual_stream
from lorac.variants.base import Variant


@dataclass(frozen=True)
class ConfigHeader:
    """The entries of a file around its configuration.

    Attributes:
        file: its path, for messages.
        name: the name of the adapter in the keys of its tensors.
        model_type: that of the model that it was trained on.
        own_class: whether the model was of one of the library's own classes, with heads.
        versioned: whether the file names the version that wrote it; the first ones did not.
        task: whether it is a task adapter of the first versions, and holds no invertible adapter.
    """

    file: Path
    name: str
    model_type: object
    own_class: bool
    versioned: bool
    task: bool


@dataclass(frozen=True)
class ModelLayout:
    """A model with the names of its places in AdapterHub.

    Attributes:
        stream: the residual stream of its hidden states.
        sublayers: by the path of the site that stands for each.
        sublayer_names: site path -> the name of the place in a file, of sublayers.
        layers: site path -> a layer that a file may adapt.
        embedder: the name in a file of the module whose embeddings an invertible adapter follows; empty for the model.
    """

    view: ModelView
    stream: ResidualStream
    sublayers: Mapping[str, Sublayer]
    sublayer_names: Mapping[str, str]
    layers: Mapping[str, AdaptableLayer]
    embedder: str = ""

    @classmethod
    def of(cls, view: ModelView, family: Family) -> "ModelLayout":
        """Return the layout of a model of a family.

        Raises:
            ExampleInputsNeeded, CaptureError: as ``trace_residual_stream``.
        """
        stream = trace_residual_stream(view)
        sublayers = find_sublayer_sites(view, stream)
        names = name_sublayers(family, stream, sublayers)
        layers = find_layers(family, stream, view.sites)
        return cls(view, stream, sublayers, names, layers, family[0].marker.rstrip("."))


@dataclass(frozen=True)
class PlacedComponent:
    """A configuration applied to a model.

    Attributes:
        variants: its methods, each with its sites.
        patterns: the keys of its tensors.
        convert: (site path, tensors in the file for it) -> its parameters.
    """

    variants: tuple[Variant, ...]
    patterns: tuple[KeyPattern, ...]
    convert: Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]

    def read(self, assigned: TensorsBySite) -> dict[str, dict[str, Tensor]]:
        """Return site path -> its parameters, from the result of ``assign_tensors``."""
        paths = dict.fromkeys(path for pattern in self.patterns for path in pattern.paths)
        return {path: self.convert(path, assigned[path]) for path in paths}


ComponentConfig = Callable[[ModelLayout, str], PlacedComponent]
"""A configuration that was read: (model, name of the adapter) -> its component, or ``FormatError``."""


@dataclass(frozen=True)
class ComponentFile:
    """A method as a file has it.

    Attributes:
        config: the configuration.
        patterns: the keys of its tensors.
        tensors: the tensors in the file.
        own_class: whether only one of the library's own classes computes it.
    """

    config: JsonMapping
    patterns: tuple[KeyPattern, ...]
    tensors: TensorsBySite
    own_class: bool = False
