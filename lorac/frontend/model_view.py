"""A model and its sites in one object, which each public operation makes from its model argument."""

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

    Each public operation makes one view (``ModelView.of``) and passes it on, so that sites are found once.

    Attributes:
        module: the model; several models as ``Components``; or the ``Skeleton`` of a model that is no longer in memory.
        sites: sites of the model by path, in module order.
        widened: name of a parameter -> its original dtype, for parameters that were cast to the wider dtype in which
            the target computes.
        stored: name -> tensor in a file, read on access, for a module on the meta device; else empty.
        resizes: whether an adapter may replace layers by layers of other sizes, as in ``lorac.compile``.
    """

    module: nn.Module
    sites: Mapping[str, Site]
    widened: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    resizes: bool = False

    @classmethod
    def of(cls, model: "Model", *, resizes: bool = False) -> "ModelView":
        """Return the view of a model, or of several models by name; return a view unchanged.

        Raises:
            WrongType: ``model`` is not a module.
        """
        if isinstance(model, ModelView):
            return model
        module = Components(model) if isinstance(model, Mapping) else strip_wrappers(model)
        return cls(module, find_sites(module), resizes=resizes)

    def with_sites(self, sites: Mapping[str, Site]) -> "ModelView":
        """Return a view of the same model with these sites added; sites with known paths are replaced."""
        return dataclasses.replace(self, sites={**self.sites, **sites})

    @functools.cached_property
    def components(self) -> dict[str, nn.Module]:
        """Name of a graph -> the module that is captured as this graph."""
        return list_components(self.module)

    @functools.cached_property
    def callable_paths(self) -> list[str]:
        """Paths of the modules that can be called: all except the model and its lists and dicts of modules."""
        containers = (nn.ModuleList, nn.ModuleDict)
        return [path for path, module in self.module.named_modules() if path and not isinstance(module, containers)]

    @functools.cached_property
    def output_layers(self) -> list[str]:
        """The path of the model's output layer, as ``find_output_layers`` returns it."""
        return find_output_layers(self.module)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name; a shared tensor has an entry under each of its names."""
        return named_tensors(self.module)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer by name, or a tensor that a module computes at each call.

        It is read from the file (``stored``) if the file has it, else from the module.
        """
        return self.stored[name] if name in self.stored else read_stored_tensor(self.module, name)

    def as_given(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter in its original dtype and size; this is exact, since the cast to the wider dtype was."""
        return self.in_own_size(name, tensor).detach().to(self.widened.get(name, tensor.dtype))

    def in_own_size(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter without the rows that were added for adapters with larger layers (``Site.own_size``)."""
        return tensor[: self._own_sizes[name]] if name in self._own_sizes else tensor

    @functools.cached_property
    def _own_sizes(self) -> dict[str, int]:
        return {name: site.own_size for site in self.sites.values() if site.own_size for name in site.stored_names}

    def list_resizable(self, replaced: Mapping[str, Tensor]) -> set[str]:
        """Return the tensors that an adapter may resize: a layer's tensors, if they have equal numbers of rows."""
        found = set[str]()
        for site in (site for site in self.sites.values() if self.resizes and site.is_resizable):
            own = (site.own_size or site.size,)
            rows = {replaced[name].shape[:1] if name in replaced else own for name in site.stored_names}
            found |= {*site.stored_names} if len(rows) == 1 else set()
        return found

    @functools.cached_property
    def base(self) -> BaseReader:
        """The reader of the weights and biases of the model's sites."""
        return make_base_reader(self.module, self.stored)

    def make_parameter_site(self, name: str) -> Site:
        """Return the site of a bare parameter or buffer (a norm's scale, a class token), which is replaced whole."""
        tensor = self.tensor(name)
        return Site(
            name,
            SiteKind.PARAMETER,
            out_features=tensor.numel(),
            in_features=1,
            dtype=tensor.dtype,
            weight=name,
            buffer=not isinstance(tensor, nn.Parameter),
            within=name.rpartition(".")[0],
        )

    @functools.cached_property
    def readable_values(self) -> ReadableValues:
        """The values that a branch may read by name: outputs, tensors and arguments of the model."""
        tensors, arguments = frozenset(self.named_tensors()), None
        if not isinstance(self.module, Skeleton):  # a skeleton has no forward, so that its arguments are unknown
            signatures = (inspect.signature(component.forward) for component in self.components.values())
            arguments = frozenset(name for signature in signatures for name in signature.parameters)
        return ReadableValues(self.sites, frozenset(self.callable_paths), tensors, arguments)


def sites(model: nn.Module | Mapping[str, nn.Module]) -> Mapping[str, Site]:
    """Return all sites of a model, or of several models given by name: path -> site, in module order.

    Raises:
        WrongType: ``model`` is not a module.
    """
    return ModelView.of(model).sites


def find_output_layers(model: nn.Module) -> list[str]:
    """Return a list with the path of the layer from a model's ``get_output_embeddings``; empty if there is none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return [path for path, module in model.named_modules() if head is not None and module is head]


Model = nn.Module | Mapping[str, nn.Module] | ModelView
"""A model, several models by name, or a view of one or several."""
