"""A model as adapters see it: the one object that a public operation makes of the model it is given."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorac.frontend.base_weights import make_base_reader, named_tensors, read_stored_tensor
from lorac.frontend.components import Components, Skeleton, list_components, strip_wrappers
from lorac.frontend.site_discovery import find_sites
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.ir.slots.program_values import ReadableValues


@dataclass(frozen=True, eq=False)
class ModelView:
    """A model with its sites.

    Each public operation makes one view (``ModelView.of``) and passes it on, so that the model is searched once.

    Attributes:
        module: the model, several models as ``Components``, or the skeleton of a model that is gone.
        sites: its sites by path, in module order.
        widened: name of a parameter -> the dtype in which it was given, if the target computes in a wider one.
        stored: tensors of a module on the meta device by name, read from a file when they are needed.
    """

    module: nn.Module
    sites: Mapping[str, Site]
    widened: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: "Model") -> "ModelView":
        """Return the view of a model or of several models by name; a view is returned as it is.

        Raises:
            WrongType: ``model`` is not a module.
        """
        if isinstance(model, ModelView):
            return model
        module = Components(model) if isinstance(model, Mapping) else strip_wrappers(model)
        return cls(module, find_sites(module))

    def with_sites(self, sites: Mapping[str, Site]) -> "ModelView":
        """Return a view of the same model with further sites, or with other descriptions of those it has."""
        return dataclasses.replace(self, sites={**self.sites, **sites})

    @functools.cached_property
    def components(self) -> dict[str, nn.Module]:
        """Graph name -> the model that is captured as that graph."""
        return list_components(self.module)

    @functools.cached_property
    def callable_paths(self) -> list[str]:
        """Paths of the modules that are called, without the model itself."""
        uncalled = (nn.ModuleList, nn.ModuleDict)
        return [path for path, module in self.module.named_modules() if path and not isinstance(module, uncalled)]

    @functools.cached_property
    def output_layers(self) -> list[str]:
        """Paths of the layer that the model names as its output layer."""
        return find_output_layers(self.module)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by every name that they have."""
        return named_tensors(self.module)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer by its name, or a tensor that its module computes at each call."""
        return self.stored[name] if name in self.stored else read_stored_tensor(self.module, name)

    def as_given(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter in the dtype in which it was given; one that was widened loses nothing."""
        return tensor.detach().to(self.widened.get(name, tensor.dtype))

    @functools.cached_property
    def base(self) -> BaseReader:
        """The reader of the model's weights."""
        return make_base_reader(self.module, self.stored)

    def make_parameter_site(self, name: str) -> Site:
        """Return the site of a bare parameter or buffer (a norm's scale, a class token), which is replaced whole."""
        tensor = self.tensor(name)
        buffer = not isinstance(tensor, nn.Parameter)
        owner = name.rpartition(".")[0]
        return Site(name, SiteKind.PARAMETER, tensor.numel(), 1, tensor.dtype, name, buffer=buffer, within=owner)

    @functools.cached_property
    def readable_values(self) -> ReadableValues:
        """The values that a branch may read by name."""
        tensors, arguments = frozenset(self.named_tensors()), None
        if not isinstance(self.module, Skeleton):  # which has no forward
            signatures = (inspect.signature(component.forward) for component in self.components.values())
            arguments = frozenset(name for signature in signatures for name in signature.parameters)
        return ReadableValues(self.sites, frozenset(self.callable_paths), tensors, arguments)


def sites(model: nn.Module | Mapping[str, nn.Module]) -> Mapping[str, Site]:
    """Return every site of a model, or of several models by name, by module path, in module order.

    Raises:
        WrongType: ``model`` is not a module.
    """
    return ModelView.of(model).sites


def find_output_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layer that a model names as its output layer."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return [path for path, module in model.named_modules() if head is not None and module is head]


Model = nn.Module | Mapping[str, nn.Module] | ModelView
"""A model, several by name, or a view of either."""
