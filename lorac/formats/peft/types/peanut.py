"""PEFT type PEANUT.

Source: peft.tuners.peanut of PEFT 0.21. A module has `peanut_A.weight` (r, out), `peanut_B.weight` (out, r), and for
each of the depth layers `peanut_encoders.<i>.weight` and `peanut_decoders.<i>.weight` (r, r). No tensor shows the input
features. lorac stores the encoders of a module in one tensor (depth, r, r), and the decoders in another.
"""

import re
from collections import defaultdict

import torch
from torch import Tensor

from lorac.formats._config_fields import Applied, read_choice, read_count, read_number, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import STARTED, WITHOUT_FAN
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants.peanut import ACTIVATIONS, PEANuT

_LAYER = re.compile(r"(.*\.peanut_(?:encoders|decoders))\.(\d{1,4})\.weight")


class PeanutType(PeftType[PEANuT]):
    """PEANUT."""

    peft_type = "PEANUT"
    variants = {PEANuT: {}}
    fields = {
        **WITHOUT_FAN,
        **STARTED,
        "r": Applied(32, to="r", read=read_size),
        "depth": Applied(0, to="depth", read=read_count),
        "act_fn": Applied("relu", to="act_fn", read=read_choice(*ACTIVATIONS)),
        "scaling": Applied(1.0, to="scaling", read=read_number),
    }
    suffixes = ("peanut_A.weight", "peanut_B.weight", "peanut_encoders", "peanut_decoders")

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Stack the tensors of numbered layers into one tensor each."""
        layers: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            if match := _LAYER.fullmatch(key):
                layers[match[1]][int(match[2])] = tensor
        joined = {key: tensor for key, tensor in tensors.items() if not _LAYER.fullmatch(key)}
        for key, numbered in layers.items():
            if set(numbered) != set(range(len(numbered))) or len({tensor.shape for tensor in numbered.values()}) > 1:
                found = {str(number): tensor for number, tensor in numbered.items()}
                raise mismatched_shapes(key, found, "layers are numbered from 0, each (r, r)")
            joined[key] = torch.stack([numbered[number] for number in range(len(numbered))])
        return joined

    def read_site(self, variant: PEANuT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = dict(zip(self.suffixes, (2, 2, 3, 3)[: 4 if variant.depth else 2], strict=False))
        expected = f"A is (r, out), B (out, r), and there are depth={variant.depth} encoders and decoders (r, r)"
        tensors = take_tensors(path, stored, axes, expected)
        tensors = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
        return matrix_site(path, tensors["peanut_A"].shape[1], 1), tensors

    def write_site(self, variant: PEANuT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        layers = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 3}
        single = {f"{name}.weight": tensor for name, tensor in tensors.items() if name not in layers}
        return single | {f"{n}.{i}.weight": layer for n, stacked in layers.items() for i, layer in enumerate(stacked)}
