"""Hydra's own files.

Source: extremebird/Hydra. The file of a vision model holds ``blocks.<n>.mlp.hydra_mlp_par.down_proj.weight`` and so on
for the layers ``mlp.fc2`` and ``attn.proj``, and the head. The file of a language model holds
``output.hydra_par.hydra_A.weight`` and so on for the layer ``output.dense``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lorac.argument_types import JsonMapping
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size, required
from lorac.formats._config_fields import Field, read_number
from lorac.variants.hydra import Hydra

_LAYERS = {"mlp.fc2": "mlp.hydra_mlp", "attn.proj": "attn.hydra_proj"}
_BRANCHES = {"par": "parallel", "seq": "sequential"}
_VISION = [
    KeyRow(f"*.{stem}_{branch}.{half}_proj.{leaf}", f"*.{layer}", f"{name}_{half}{end}")
    for layer, stem in _LAYERS.items()
    for branch, name in _BRANCHES.items()
    for half in ("down", "up")
    for leaf, end in (("weight", ""), ("bias", "_bias"))
]
_LANGUAGE = [
    KeyRow(f"*.output.hydra_{branch}.hydra_{factor}.weight", "*.output.dense", f"{name}_{half}")
    for branch, name in _BRANCHES.items()
    for factor, half in (("A", "down"), ("B", "up"))
]
_SETTINGS: Mapping[str, Field] = {"scale": required("scale", read_number)}


class HydraFormat(AuthorsFormat):
    """Hydra's own files."""

    name = "hydra"
    looks_for = "a file with tensors …hydra_mlp_par…, …hydra_proj_par… or …hydra_par…"
    written_by = "Hydra's authors"
    methods = (Hydra,)
    rows = (*_VISION, *_LANGUAGE)
    mark = re.compile(r"\.hydra_(mlp_|proj_)?(par|seq)\.")
    weights = "hydra.pt"
    settings = _SETTINGS
    trained = ("head.",)

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> Hydra:
        biased = any("parallel_down_bias" in stored for stored in tensors.values())
        return Hydra(
            r=find_size(tensors, "parallel_down", 0, file),
            r_sequential=find_size(tensors, "sequential_down", 0, file),
            scale=values["scale"],
            branch_bias=biased,
        )


FORMAT = HydraFormat()
