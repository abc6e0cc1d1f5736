"""PEFT types that store each parameter as one tensor, in the shape that the formula reads."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import warn
from lorac.formats._config_fields import (
    Applied,
    Refused,
    TrainingOnly,
    read_choice,
    read_count,
    read_number,
    read_number_pattern,
    read_rank_pattern,
    read_size,
    write_number,
    write_number_pattern,
)
from lorac.formats._errors import unsupported_error
from lorac.formats.peft.fields import COMMON, EXCLUDE, LAYERS, PATTERNS, STARTED, WITHOUT_FAN, bias, own
from lorac.formats.peft.peft_type import PlainType, Tensors
from lorac.ir.sites.site import Site
from lorac.variants.base_parameters import BEFT
from lorac.variants.c3a import C3A
from lorac.variants.delora import DeLoRA
from lorac.variants.glora import GLoRAHadamard
from lorac.variants.gralora import GraLoRA
from lorac.variants.lily import Lily, group_sites
from lorac.variants.poly import Poly
from lorac.variants.road import RoAd


class BeftType(PlainType[BEFT]):
    """BEFT.

    Source: peft.tuners.beft of PEFT 0.21. A module has only `beft_bias` (1, out), which does not show its input
    features.
    """

    peft_type = "BEFT"
    variants = {BEFT: {}}
    fields = {**WITHOUT_FAN, "init_weights": TrainingOnly(True)}
    suffixes = ("beft_bias",)

    sizes = ("beft_bias", 1), None


class C3aType(PlainType[C3A]):
    """C3A.

    Source: peft.tuners.c3a of PEFT 0.21. A module has `c3a_kernel` (out/b, in/b, b). PEFT transforms in float32, for
    any dtype of the model, and feeds the output of one active adapter to the next; lorac adds up the changes of all.
    """

    peft_type = "C3A"
    variants = {C3A: {}}
    fields = {
        **WITHOUT_FAN,
        **LAYERS,
        "block_size": Applied(256, to="block_size", read=read_size),
        "block_size_pattern": Applied({}, to="block_size_pattern", read=read_rank_pattern, write=write_number_pattern),
        "bias": bias("c3a"),
        "init_weights": TrainingOnly("xavier_uniform"),
    }
    suffixes = ("c3a_kernel",)

    def measure(self, variant: C3A, stored: Tensors) -> tuple[int, int]:
        rows, columns, size = stored["c3a_kernel"].shape
        return rows * size, columns * size


class DeloraType(PlainType[DeLoRA]):
    """DELORA.

    Source: peft.tuners.delora of PEFT 0.21. A module has `delora_A` (r, in), `delora_B` (out, r), `delora_lambda` (1,)
    and the norms `delora_w_norm` (in,) of the columns of the weight.
    """

    peft_type = "DELORA"
    variants = {DeLoRA: {}}
    fields = {
        **WITHOUT_FAN,
        **STARTED,
        "r": Applied(8, to="r", read=read_size),
        "rank_pattern": PATTERNS["rank_pattern"],
        "delora_lambda": TrainingOnly(15, to="delora_lambda", read=read_number, write=write_number),
        "lambda_pattern": TrainingOnly({}, to="lambda_pattern", read=read_number_pattern, write=write_number_pattern),
        # Despite its name, PEFT applies it as dropout to inputs of the change.
        "module_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "bias": bias("delora"),
    }
    suffixes = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    sizes = ("delora_B", 0), ("delora_A", 1)


_EMPTY = ".zeros"
_ROWS = ("A.Xd", "A.X", "A.zeros", "D.X", "D.zeros")
"""Tensors with an axis of outputs, the first."""
_COLUMNS = {"A.Xu": 1, "A.zeros": 1, "C.Xd": 0, "C.X": 0, "C.zeros": 0}
"""Tensor -> its axis of inputs."""


class GloraType(PlainType[GLoRAHadamard]):
    """GLORA.

    It multiplies W elementwise by A, where LyCORIS's GLoRA multiplies matrices. Source: peft.tuners.glora of PEFT 0.21.
    For each of A to E a module has `glora_<A>.Xd` and `glora_<A>.Xu`, or `glora_<A>.X`, or zeros `glora_<A>.zeros` of
    the full shape if the part is not configured. At layers without a bias C, D and E are always zeros.
    """

    peft_type = "GLORA"
    variants = {GLoRAHadamard: {}}
    fields = {
        **WITHOUT_FAN,
        "r": Applied(8, to="r", read=read_size),
        "config_A_B": Applied("lora", to="config_A_B", read=read_choice("lora", "vector", "constant", "none")),
        "config_C": Applied("lora", to="config_C", read=read_choice("lora", "vector", "none")),
        "config_D_E": Applied("constant", to="config_D_E", read=read_choice("vector", "constant", "none")),
        "bias": bias("glora"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in ("Xd", "Xu", "X", "zeros"))

    def read_site(self, variant: GLoRAHadamard, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the site and its parameters, without the zeros of absent parts, which only show sizes."""
        kept = {suffix: tensor for suffix, tensor in stored.items() if not suffix.endswith(_EMPTY) or tensor.any()}
        site, tensors = super().read_site(variant, path, kept)
        rows, columns = self.measure(variant, stored)
        return replace(site, out_features=rows, in_features=columns), tensors

    def measure(self, variant: GLoRAHadamard, stored: Tensors) -> tuple[int, int]:
        shapes = {suffix.removeprefix("glora_"): (*tensor.shape, 1, 1) for suffix, tensor in stored.items()}
        rows = max((shape[0] for name, shape in shapes.items() if name in _ROWS), default=1)
        columns = max((shape[_COLUMNS[name]] for name, shape in shapes.items() if name in _COLUMNS), default=1)
        return rows, columns

    def write_site(self, variant: GLoRAHadamard, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        rows, columns = site.out_features, site.in_features
        sizes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1), "D": (rows,), "E": (rows,)}
        absent = [name for name in sizes if not any(key.startswith(f"glora_{name}_") for key in tensors)]
        like = next(iter(tensors.values()), torch.zeros(0))
        written = super().write_site(variant, site, tensors)
        return written | {f"glora_{name}{_EMPTY}": like.new_zeros(sizes[name]) for name in absent}


class GraloraType(PlainType[GraLoRA]):
    """GRALORA.

    Source: peft.tuners.gralora of PEFT 0.21. With k = gralora_k a module has `gralora_A` (k, in/k, r) and `gralora_B`
    (k, r, out/k), and with hybrid_r the factors `gralora_A_general.weight` and `gralora_B_general.weight` of a LoRA.
    """

    peft_type = "GRALORA"
    variants = {GraLoRA: {}}
    fields = {
        **COMMON,
        **LAYERS,
        "r": Applied(32, to="r", read=read_size),
        "hybrid_r": Applied(0, to="hybrid_r", read=read_count),
        "alpha": Applied(64, to="alpha", read=read_number, write=write_number),
        "gralora_k": Applied(2, to="k", read=read_size),
        "gralora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "bias": bias("gralora"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
    conv1d = True

    def measure(self, variant: GraLoRA, stored: Tensors) -> tuple[int, int]:
        a, b = stored["gralora_A"], stored["gralora_B"]
        return b.shape[0] * b.shape[2], a.shape[0] * a.shape[1]


class LilyType(PlainType[Lily]):
    """LILY.

    Source: peft.tuners.lily of PEFT 0.21. A module has `lily_A.weight` (r, in), `lily_B.weight` (num_B·r, out) and
    `lily_router.weight` (num_B, r). A file repeats A and B at every module that shares them. PEFT determines these
    modules from target_modules and stride_A; where copies differ, it keeps the last.
    """

    peft_type = "LILY"
    variants = {Lily: {}}
    fields = {
        **WITHOUT_FAN,
        **STARTED,
        **own(read_size, r=32, stride_A=1, num_B=2),
        "scaling": Applied(1.0, to="scaling", read=read_number),
    }
    suffixes = ("lily_A.weight", "lily_B.weight", "lily_router.weight")

    sizes = ("lily_B.weight", 1), ("lily_A.weight", 1)

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Replace equal copies by one tensor, so that training keeps them equal."""
        known: dict[tuple[object, ...], list[torch.Tensor]] = {}
        found = {}
        for key, tensor in tensors.items():
            alike = known.setdefault((key.split(".")[-2:][0], *tensor.shape), [])
            found[key] = next((other for other in alike if torch.equal(other, tensor)), tensor)
            alike.append(found[key])
        return found

    def check_copies(self, config: JsonMapping, sites: Iterable[Site], stored: Mapping[str, Tensors]) -> None:
        for path, owners in group_sites(config["target_modules"], config["stride_A"], sites).items():
            for name, owner in zip(("lily_A", "lily_B"), owners, strict=True):
                if not torch.equal(stored[path][name], stored[owner][name]):
                    raise unsupported_error(
                        f"PEFT's LILY uses one {name} for '{path}' and '{owner}', and the adapter has two"
                    )


class PolyType(PlainType[Poly]):
    """POLY.

    Source: peft.tuners.poly of PEFT 0.21. A module has `poly_lora_A` (splits, skills, in/splits, r), `poly_lora_B`
    (splits, skills, r, out/splits) and `poly_router.module_logits` (tasks, splits·skills). PEFT gets the task of each
    row as task_ids; in lorac a task is an adapter.
    """

    peft_type = "POLY"
    variants = {Poly: {}}
    fields = {
        **WITHOUT_FAN,
        **EXCLUDE,
        **own(read_size, r=8, n_tasks=1, n_skills=4, n_splits=1),
        "poly_type": Refused("poly", next_step="PEFT has no other"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")

    def measure(self, variant: Poly, stored: Tensors) -> tuple[int, int]:
        a, b = stored["poly_lora_A"], stored["poly_lora_B"]
        return b.shape[0] * b.shape[3], a.shape[0] * a.shape[2]

    def refine_variant(self, variant: Poly, values: JsonMapping, stored: Mapping[str, Tensors]) -> Poly:
        if variant.n_tasks > 1:
            warn(
                f"the file has {variant.n_tasks} tasks, which PEFT chooses by task_ids, and the adapter acts as task 0",
                next_step="make an adapter for each task by lorac.Poly.by_task(adapter), and name tasks in adapters=",
            )
        return variant


_FORMS = {"road_1": 2, "road_2": 1, "road_4": 0.5}
"""Variant -> outputs for each angle."""


class RoadType(PlainType[RoAd]):
    """ROAD.

    Source: peft.tuners.road of PEFT 0.21. A module has `road_theta` and `road_alpha` of out/2, out or 2·out numbers,
    for the variants road_1, road_2 and road_4. No tensor shows the input features. PEFT applies several active adapters
    in sequence, each to the output of the previous one; lorac adds up the changes that each makes to the base.
    """

    peft_type = "ROAD"
    variants = {RoAd: {}}
    fields = {
        **WITHOUT_FAN,
        "variant": Applied("road_1", to="variant", read=read_choice(*_FORMS)),
        "group_size": Applied(64, to="group_size", read=read_size),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("road_theta", "road_alpha")

    def measure(self, variant: RoAd, stored: Tensors) -> tuple[int, int]:
        return int(len(stored["road_theta"]) * _FORMS[variant.variant]), 1
