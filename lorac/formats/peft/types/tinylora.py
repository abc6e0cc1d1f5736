"""PEFT type TINYLORA.

Source: peft.tuners.tinylora of PEFT 0.21. A module has `tinylora_A` (r, in), `tinylora_B` (out, r) and `tinylora_P` (u,
r, r), which files with save_projection=False omit. `base_model.tinylora_v.<i>` (u,) belongs to the i-th group. The
order of the modules in the model determines the groups, and the seeds of P. At an embedding A is (r, d), B is (V, r),
and the core is between them; lorac stores the transposes, since its table is (d, V).
"""

from torch import Tensor

from lorac.formats._config_fields import Applied, TrainingOnly, read_choice, read_flag, read_int, read_number, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, LAYERS, bias, own
from lorac.formats.peft.peft_type import Parameters, PeftType, Tensors, mismatched_shapes, take_tensors
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.variants.tinylora import TinyLoRA

VECTOR = "tinylora_v"


class TinyloraType(PeftType[TinyLoRA]):
    """TINYLORA."""

    peft_type = "TINYLORA"
    variants = {TinyLoRA: {}}
    fields = {
        **COMMON,
        **LAYERS,
        **own(read_size, r=2, u=64),
        "weight_tying": Applied(0.0, to="weight_tying", read=read_number),
        "projection_seed": Applied(42, to="projection_seed", read=read_int),
        # If False, the file omits P; lorac always writes it.
        "save_projection": Applied(True, read=read_flag),
        "tinylora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "init_v_bound": TrainingOnly(0.02, preserved=True, read=read_number),
        "init_weights": TrainingOnly(True, read=read_choice(True, False, "uniform")),
        "bias": bias("tinylora"),
    }
    shared = (VECTOR,)
    suffixes = ("tinylora_A", "tinylora_B", "tinylora_P")
    kinds = frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING})
    conv1d = True
    needs_model = True
    ordered = True

    def read_site(self, variant: TinyLoRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        key = f"{VECTOR}.{variant.group(path)}"
        own = {name: tensor for name, tensor in stored.items() if name == key or not name.startswith(VECTOR)}
        axes = {"tinylora_A": 2, "tinylora_B": 2, **({"tinylora_P": 3} if "tinylora_P" in own else {}), key: 1}
        tensors = take_tensors(path, own, axes, f"A is (r, in), B (out, r), P (u, r, r), and {key} (u,)")
        if tensors[key].shape != (variant.u,):
            raise mismatched_shapes(path, own, f"{key} is (u,), and u is {variant.u}")
        tensors[VECTOR] = tensors.pop(key)
        return matrix_site(path, len(tensors["tinylora_B"]), tensors["tinylora_A"].shape[1]), tensors

    def complete_site(self, variant: TinyLoRA, site: Site, tensors: Parameters, base: BaseReader) -> Parameters:
        return super().complete_site(variant, site, _turn(site, tensors), base)

    def write_site(self, variant: TinyLoRA, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        names = {VECTOR: f"{VECTOR}.{variant.group(site.path)}"}
        return {names.get(name, name): tensor for name, tensor in _turn(site, tensors).items()}


def _turn(site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """Transpose the tensors of an embedding between PEFT's table and lorac's, in either direction."""
    if site.kind is not SiteKind.EMBEDDING:
        return dict(tensors)
    turned = {"tinylora_A": tensors["tinylora_B"].t(), "tinylora_B": tensors["tinylora_A"].t()}
    projection = {"tinylora_P": tensors["tinylora_P"].transpose(1, 2)} if "tinylora_P" in tensors else {}
    return {**tensors, **turned, **projection}
