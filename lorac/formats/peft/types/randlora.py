"""PEFT type RANDLORA.

Source: peft.tuners.randlora of PEFT 0.21. Let d and D be the smaller and the larger of out and in, and n = ⌈d/r⌉. A
module has `randlora_lambda` (r, n) and `randlora_gamma` (n, d). All modules share `randlora_A` (r, 1, d) and
`randlora_B` (D, n, r), with d and D from the largest out and the largest in. PEFT writes the shared tensors once as
`base_model.<name>` and again at every module; lorac writes them once, and PEFT reads such a file with a warning of
missing copies. With save_projection=False a file omits them, and they are drawn from projection_prng_key. No tensor
shows the larger side of a site.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_flag, read_number, read_size, write_number
from lorac.formats.peft.fields import COMMON, LAYERS, SEEDED, bias, own
from lorac.formats.peft.peft_type import PlainType
from lorac.ir.sites.site import Site
from lorac.variants.randlora import RandLoRA, draw_bases


class RandloraType(PlainType[RandLoRA]):
    """RANDLORA."""

    peft_type = "RANDLORA"
    variants = {RandLoRA: {}}
    fields = {
        **COMMON,
        **LAYERS,
        **SEEDED,
        "r": Applied(32, to="r", read=read_size),
        "randlora_alpha": Applied(640, to="alpha", read=read_number, write=write_number),
        "randlora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        # The distribution of A and B, which determines them where save_projection is False.
        **own(read_flag, sparse=False, very_sparse=False),
        "bias": bias("randlora"),
    }
    shared = ("randlora_A", "randlora_B")
    suffixes = ("randlora_lambda", "randlora_gamma")
    conv1d = True

    sizes = (("randlora_gamma", 1),) * 2

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        small, large = sorted((out_features, in_features))
        variant = RandLoRA(r=values["r"], sparse=values["sparse"], very_sparse=values["very_sparse"])
        key, sparsity = values["projection_prng_key"], variant.sparsity(small)
        return draw_bases(*_shapes(variant.r, small, large), key=key, sparsity=sparsity)

    def shared_shapes(self, variant: RandLoRA, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes for the largest out and the largest in, which may belong to different sites."""
        small, large = sorted((max(site.out_features for site in sites), max(site.in_features for site in sites)))
        return dict(zip(self.shared, _shapes(variant.r, small, large), strict=True))


def _shapes(r: int, small: int, large: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (r, 1, small), (large, math.ceil(small / r), r)
