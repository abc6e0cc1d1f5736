"""Modules of a file that cover several layers of the model: their rows are split by layer, or concatenated."""

import dataclasses
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import AnyLayout, Method
from lorac.formats._image_files.original_names import Place
from lorac.variants.base import Params
from lorac.variants.dora import DoRA
from lorac.variants.edit import Edit
from lorac.variants.lora import LoRA

_PART = re.compile(r"part\d+_")
_MAGNITUDE = "magnitude"


def split_rows(
    method: Method, layout: AnyLayout, place: Place, widths: Sequence[int], columns: int, key: str
) -> list[Method | None]:
    """Split a method by the rows of each layer; a layer whose rows a LoRA leaves unchanged gets None.

    Args:
        widths: the number of rows of each layer.
        columns: the number of columns.
        key: the name of a tensor of the module, for messages.

    Raises:
        FormatError: the method cannot be split by rows.
    """
    variant, tensors = method
    rows = layout.rows
    if layout.adds and rows is None:
        zero = next(iter(tensors.values())).new_zeros(sum(widths), columns)
        variant, tensors = Edit(), {"delta": variant.weight(zero, Params(**tensors))}
        rows = ("delta",)
    if rows is None:
        raise unsupported_error(
            f"'{key}' is of {variant.name} at one layer, which is {len(widths)} layers here, and its rows cannot be "
            "split",
            next_step="save it from its trainer under the names of diffusers",
        )
    by_rows = {name for name in tensors if _PART.sub("", name) in (*rows, _MAGNITUDE)}
    parts: list[Method] = []
    for index in range(len(widths)):
        first = sum(widths[:index])
        own = {
            name: tensor[first : first + widths[index]] if name in by_rows else tensor
            for name, tensor in tensors.items()
        }
        if place.swapped:
            own |= {name: torch.cat(own[name].chunk(2)[::-1]) for name in by_rows}
        parts.append(_drop_idle((variant, {name: tensor.clone() for name, tensor in own.items()})))
    idle = [
        type(own_variant) is LoRA and not any(tensor.any() for name, tensor in own.items() if name != "lora_A")
        for own_variant, own in parts
    ]
    return [None if quiet and not all(idle) else part for part, quiet in zip(parts, idle, strict=True)]


def _drop_idle(method: Method) -> Method:
    """Return a LoRA without the rank components that these rows do not use."""
    variant, tensors = method
    if not isinstance(variant, LoRA | DoRA):
        return method
    used = tensors["lora_B"].any(0)
    rank = int(used.sum())
    if rank in (0, variant.r):
        return method
    factors = {"lora_A": tensors["lora_A"][used], "lora_B": tensors["lora_B"][:, used]}
    return dataclasses.replace(variant, r=rank, alpha=variant.alpha * rank / variant.r), {**tensors, **factors}


def join_rows(methods: Sequence[Method], place: Place) -> Method | None:
    """Merge the LoRAs of several layers into one; return None if their scales differ or a method is not a LoRA.

    Equal factors A are stored once; different ones are concatenated, and B becomes a block matrix.
    """
    variants = [variant for variant, _ in methods]
    if any(type(variant) is not type(variants[0]) for variant in variants) or not isinstance(variants[0], LoRA | DoRA):
        return None
    if any(variant.scale != variants[0].scale for variant in variants if isinstance(variant, LoRA | DoRA)):
        return None
    downs: list[Tensor] = []
    for _, tensors in methods:
        if not any(torch.equal(tensors["lora_A"], down) for down in downs):
            downs.append(tensors["lora_A"])
    a = torch.cat(downs)
    ups = []
    for _, tensors in methods:
        at = next(index for index, down in enumerate(downs) if torch.equal(down, tensors["lora_A"]))
        first = sum(len(down) for down in downs[:at])
        up = tensors["lora_B"].new_zeros(len(tensors["lora_B"]), len(a))
        up[:, first : first + len(downs[at])] = tensors["lora_B"]
        ups.append(up)
    joined = {"lora_A": a, "lora_B": torch.cat(ups)}
    for name in sorted(methods[0][1].keys() - joined.keys()):
        joined[name] = torch.cat([tensors[name] for _, tensors in methods])
    if place.swapped:
        joined |= {name: torch.cat(joined[name].chunk(2)[::-1]) for name in joined.keys() - {"lora_A"}}
    scale = float(variants[0].scale)
    return dataclasses.replace(variants[0], r=len(a), alpha=scale * len(a), rslora=False), joined
