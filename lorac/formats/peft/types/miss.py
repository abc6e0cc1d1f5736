"""PEFT type MISS: MiSS, its mini form and BAT; and type BONE, the name in releases of PEFT before MISS.

Source: peft.tuners.miss of PEFT 0.21. A module has one tensor `miss_block`: (r, out), mini (r, mini_r), BAT (out/r, r,
r), according to `init_weights`. Only nn.Linear is adapted, and the tensor does not show its input features. PEFT
applies several active BATs in sequence, each to the result of the previous one; lorac adds up the changes that each
makes to the base. BONE (peft.tuners.bone of PEFT 0.14 to 0.17) names the tensor `bone_block`, and has no mini form or
dropout.
"""

from torch import Tensor

from lorac.formats._config_fields import Applied, TrainingOnly, read_number, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import FILTERS, WITHOUT_FAN, bias, own
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site
from lorac.variants.miss import BAT, MiSS

BLOCK = "miss_block"


def read_form(value: object) -> str | bool:
    """Return the form that init_weights selects: `"bat"`, else whether it is the mini form."""
    if value is None or isinstance(value, bool):
        return False
    if value not in ("bat", "mini"):
        raise ValueError("expected true, false, bat or mini")
    return "bat" if value == "bat" else True


class MissType(PeftType[MiSS | BAT]):
    """MISS."""

    peft_type = "MISS"
    variants = {BAT: {"init_weights": "bat"}, MiSS: {}}
    fields = {
        **WITHOUT_FAN,
        **FILTERS,
        **own(read_size, r=64, mini_r=1),
        "miss_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "init_weights": Applied(True, to="mini", read=read_form, write=lambda mini: "mini" if mini else True),
        "bias": bias("MiSS"),
    }
    suffixes = (BLOCK,)
    former_names = ("BONE",)

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Rename BONE's keys to those of MISS."""
        return {key.replace(".bone_block", f".{BLOCK}"): tensor for key, tensor in tensors.items()}

    def read_site(self, variant: MiSS | BAT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the block, and a site with the sizes that it shows: r inputs, and for the mini form mini_r outputs."""
        block = stored[BLOCK]
        is_bat = isinstance(variant, BAT)
        if block.ndim != (3 if is_bat else 2):
            expected = "a block of 3 axes is of init_weights='bat', one of 2 of true, false or 'mini'"
            raise mismatched_shapes(path, stored, expected)
        out = block.shape[0] * block.shape[1] if is_bat else block.shape[1]
        return matrix_site(path, out, variant.r), {BLOCK: block}
