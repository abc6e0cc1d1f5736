"""Components of an AdapterHub file: each is one configuration with the places of its tensors in a model."""

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
    """The entries of an AdapterHub configuration file other than the configuration itself.

    Attributes:
        file: the path of the file, for messages.
        name: the name of the adapter in the keys of the tensors.
        model_type: the model_type of the model that the adapter was trained on.
        own_class: whether that model was of one of the library's own classes, which have heads.
        versioned: whether the file names the library version that wrote it; the earliest versions did not.
        task: whether this is a task adapter of the earliest versions, which has no invertible adapter.
    """

    file: Path
    name: str
    model_type: object
    own_class: bool
    versioned: bool
    task: bool


@dataclass(frozen=True)
class ModelLayout:
    """A model, with AdapterHub's names of the places where adapters act.

    Attributes:
        stream: the residual stream of the hidden states.
        sublayers: path of the site that stands for a sublayer -> the sublayer.
        sublayer_names: path of that site -> the name of the sublayer's bottleneck in a file.
        layers: site path -> the layer, for every layer that a file may adapt.
        embedder: the name in a file of the module whose embeddings an invertible adapter transforms; empty for the
            model itself.
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
    """A configuration, applied to a model.

    Attributes:
        variants: the methods, each with its sites.
        patterns: the keys of the tensors.
        convert: (site path, the file's tensors for the site) -> the parameters of the site.
    """

    variants: tuple[Variant, ...]
    patterns: tuple[KeyPattern, ...]
    convert: Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]

    def read(self, assigned: TensorsBySite) -> dict[str, dict[str, Tensor]]:
        """Return site path -> parameters, from the result of ``assign_tensors``."""
        paths = dict.fromkeys(path for pattern in self.patterns for path in pattern.paths)
        return {path: self.convert(path, assigned[path]) for path in paths}


ComponentConfig = Callable[[ModelLayout, str], PlacedComponent]
"""A configuration that was read: (model, name of the adapter) -> its component, or ``FormatError``."""


@dataclass(frozen=True)
class ComponentFile:
    """A method in the form that a file stores.

    Attributes:
        config: the configuration.
        patterns: the keys of the tensors.
        tensors: the tensors of the file.
        own_class: whether only the library's own model classes compute the method.
    """

    config: JsonMapping
    patterns: tuple[KeyPattern, ...]
    tensors: TensorsBySite
    own_class: bool = False
