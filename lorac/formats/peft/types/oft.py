"""PEFT type OFT.

Source: peft.tuners.oft of PEFT 0.21 (config.py, layer.py). In a file a module has `oft_R.weight` (blocks, β(β−1)/2), at
embeddings `oft_embedding_R.weight`. Files from before 0.16 have whole matrices under `oft_r`; before 0.18 the series
had another last term, and PEFT warns of such files. At convolutions PEFT's forward pass rotates patches and adds them
up where they overlap, which differs from its merged weight; lorac computes with the merged weight.
"""

import re

from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    Irrelevant,
    read_count,
    read_flag,
    read_number,
    read_size,
)
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, STARTED, bias, own
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.oft import OFT

SUFFIXES = {"oft_R.weight": "oft_R", "oft_embedding_R.weight": "oft_embedding_R"}
_SERIES = "0.18.0"
"""The release that changed the last term of the series."""


def read_series(value: object) -> str:
    """Return the last version of PEFT that changed the computation; refuse files from before it."""
    numbers = re.match(r"(\d+)\.(\d+)", value) if isinstance(value, str) else None
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 18):
        raise ValueError("OFT of PEFT before 0.18 rotates by another series; load it there and train it again")
    return _SERIES


class OftType(PeftType[OFT]):
    """OFT."""

    peft_type = "OFT"
    variants = {OFT: {"peft_version": _SERIES}}
    fields = {
        **COMMON,
        **STARTED,
        "peft_version": Applied(read=read_series),
        "r": Applied(0, to="r", read=read_count),
        "oft_block_size": Applied(32, to="block_size", read=read_count),
        **own(read_flag, block_share=False, use_cayley_neumann=True, coft=False),
        "num_cayley_neumann_terms": Applied(5, to="num_cayley_neumann_terms", read=read_size),
        "eps": Applied(6e-5, to="eps", read=read_number),
        "bias": bias("oft"),
        # PEFT creates a dropout layer from it, but never calls the layer.
        "module_dropout": Irrelevant(0.0),
    }
    suffixes = tuple(SUFFIXES)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.CONV2D})

    def read_site(self, variant: OFT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the upper triangles (blocks, β(β−1)/2), and a site with as many features as they rotate."""
        ((suffix, upper), *more) = stored.items()
        size = round((1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2) if upper.ndim == 2 else 0
        if more or upper.ndim != 2 or not len(upper) or size * (size - 1) != 2 * upper.shape[1]:
            raise mismatched_shapes(path, stored, "they are (blocks, size·(size − 1)/2)")
        # The file shows the size of a shared block, but not how often it is applied.
        width = size * (len(upper) if not variant.block_share else variant.r or 1)
        name = SUFFIXES[suffix]
        embedding = name == "oft_embedding_R"
        site = matrix_site(path, width, 1, SiteKind.EMBEDDING) if embedding else matrix_site(path, 1, width)
        return site, {name: upper}

    def write_site(self, variant: OFT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        return {suffix: tensors[name] for suffix, name in SUFFIXES.items() if name in tensors}
