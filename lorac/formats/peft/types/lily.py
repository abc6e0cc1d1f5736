"""PEFT type LILY.

Source: peft.tuners.lily of PEFT 0.21. A module has `lily_A.weight` (r, in), `lily_B.weight` (num_B·r, out) and
`lily_router.weight` (num_B, r). A file repeats A and B at every module that shares them. PEFT determines these modules
from target_modules and stride_A; where copies differ, it keeps the last.
"""

from collections.abc import Iterable, Mapping

import torch

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, read_number, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats.peft.fields import STARTED, WITHOUT_FAN, own
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.ir.sites.site import Site
from lorac.variants.lily import Lily, group_sites


class LilyType(PlainType[Lily]):
    """LILY."""

    peft_type = "LILY"
    variants = {Lily: {}}
    fields = {
        **WITHOUT_FAN,
        **STARTED,
        **own(read_size, r=32, stride_A=1, num_B=2),
        "scaling": Applied(1.0, to="scaling", read=read_number),
    }
    suffixes = ("lily_A.weight", "lily_B.weight", "lily_router.weight")

    def measure(self, variant: Lily, stored: Tensors) -> tuple[int, int]:
        return stored["lily_B.weight"].shape[1], stored["lily_A.weight"].shape[1]

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Replace equal copies by one tensor, so that training keeps them equal."""
        known: dict[tuple[object, ...], list[torch.Tensor]] = {}
        found = {}
        for key, tensor in tensors.items():
            alike = known.setdefault((key.split(".")[-2], *tensor.shape), [])
            found[key] = next((other for other in alike if torch.equal(other, tensor)), tensor)
            alike.append(found[key])
        return found

    def check_copies(self, config: JsonMapping, sites: Iterable[Site], stored: Mapping[str, Tensors]) -> None:
        for path, owners in group_sites(config["target_modules"], config["stride_A"], sites).items():
            for name, owner in zip(("lily_A", "lily_B"), owners, strict=True):
                if not torch.equal(stored[path][name], stored[owner][name]):
                    raise unsupported_error(
                        f"PEFT's LILY gives '{path}' the {name} of '{owner}', and the adapter's differ",
                        next_step="use format='native'",
                    )
