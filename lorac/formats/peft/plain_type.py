"""The base class of PEFT types that store each parameter as one tensor, in the shape that the formula reads."""

from abc import abstractmethod
from dataclasses import replace

from torch import Tensor

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.peft_type import PeftType, Tensors, V, mismatched_shapes
from lorac.ir.sites.site import Site


class PlainType(PeftType[V]):
    """A type whose parameters are a file's tensors unchanged, named by their suffixes with underscores for dots.

    Where a file has a tensor for the bias, the layer has a bias.
    """

    @abstractmethod
    def measure(self, variant: V, stored: Tensors) -> tuple[int, int]:
        """Return the output and input features that a layer's tensors show; 1 where they show none."""

    def read_site(self, variant: V, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        smallest, here = matrix_site(path, 1, 1), variant.at_path(path)
        needed, specs = (here.params(replace(smallest, bias=bias)) for bias in (None, "bias"))
        tensors = {parameter_name(suffix): tensor for suffix, tensor in stored.items()}
        is_complete = needed.keys() <= tensors.keys() <= specs.keys()
        if not is_complete or any(tensor.ndim != len(specs[name].shape) for name, tensor in tensors.items()):
            expected = ", ".join(f"{name} has {len(spec.shape)} axes" for name, spec in specs.items())
            raise mismatched_shapes(path, stored, expected)
        site = matrix_site(path, *self.measure(variant, stored))
        return replace(site, bias=None if tensors.keys() <= needed.keys() else f"{path}.bias"), tensors

    def write_site(self, variant: V, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        names = {suffix: parameter_name(suffix) for suffix in self.suffixes}
        return {suffix: tensors[name] for suffix, name in names.items() if name in tensors}


def parameter_name(suffix: str) -> str:
    """Return the name of the parameter that has a suffix."""
    return suffix.removesuffix(".weight").replace(".", "_")
