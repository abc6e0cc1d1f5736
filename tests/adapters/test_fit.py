"""Whether an adapter fits: every fault has one error and one text, whichever way the adapter came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac import LoracError
from lorac.adapters.base_hash import compute_base_hash, compute_tensor_hash
from lorac.frontend.model_view import ModelView
from tests.refusing import refuses

NAME = "mine"


@dataclass(frozen=True, kw_only=True)
class Listener(lorac.BranchVariant):
    """Adds a multiple of a value of the program."""

    of: str = ""
    name, paper = "test-listener", "none"

    def reads(self, site):
        return (self.of,)

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {"factor": lorac.ParamSpec((1,), lambda context: torch.ones(context.shape))}

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + p.factor * ctx.value(self.of)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.LayerNorm(4)
        self.ring = nn.ConvTranspose1d(4, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 4, 1)
        self.table = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.down(self.up(x)))
        return self.line(self.ring(y.mT)).mT + self.table.weight.sum()  # type: ignore[no-any-return]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def good(**fields: Any) -> lorac.Adapter:
    """An adapter that fits, but for what ``fields`` say."""
    tensors = {"up": {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}}
    made = {"variant": lorac.LoRA(r=2, targets=["up"]), "tensors": tensors, "replaced": {}, "provenance": {}}
    return lorac.Adapter(NAME, **{**made, **fields})


def at(path: str, **tensors: Tensor) -> dict[str, dict[str, Tensor]]:
    return {path: {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)} | tensors}


def shira(indices: Tensor) -> lorac.Adapter:
    variant = lorac.SHiRA(r=1, targets=["up"])
    return lorac.Adapter(NAME, variant, {"up": {"indices": indices, "values": torch.ones(indices.shape[1])}})


def other_base() -> nn.Module:
    other = model()
    with torch.no_grad():
        other.get_parameter("up.weight").add_(1)
    return other


FAULTS: dict[str, tuple[lorac.Adapter, type[LoracError], str]] = {
    "nothing": (
        good(variant=lorac.LoRA(r=2, targets=["upp"]), tensors={}),
        lorac.SiteError,
        "adapter 'mine' targets 'upp', which matches no site\n  nearest: up (1 sites, linear 4 -> 6)\n"
        "  `lorac sites MODEL` prints them all",
    ),
    "no module": (
        good(tensors=at("upp")),
        lorac.SiteError,
        "adapter 'mine' has tensors for 'upp', which is not a module of the model\n  nearest: up\n"
        "  load the model that the adapter was trained on; `lorac sites MODEL` prints the sites of one",
    ),
    "no site": (
        good(tensors=at("ring")),
        lorac.SiteError,
        "adapter 'mine' has tensors for 'ring', a ConvTranspose1d that lorac cannot adapt\n"
        "  train the adapter with that layer in exclude_modules",
    ),
    "another kind": (
        good(variant=Listener(targets=["line"], of="up"), tensors={"line": {"factor": torch.ones(1)}}),
        lorac.SiteError,
        "test-listener adapts linear sites; 'line' is a conv1d\n  narrow targets=, or add the module to exclude=",
    ),
    "one too many": (
        good(tensors=at("up", lora_AA=torch.ones(1))),
        lorac.FormatError,
        "adapter 'mine' has a tensor 'lora_AA' at 'up' that its method does not use\n  nearest: lora_A\n"
        "  lora as configured has lora_A, lora_B there",
    ),
    "one too few": (
        good(tensors={"up": {"lora_A": torch.ones(2, 4)}}),
        lorac.AdapterError,
        "adapter 'mine' lacks the tensor 'lora_B' at 'up'\n  lora as configured has lora_A, lora_B there",
    ),
    "another shape": (
        good(tensors=at("up", lora_A=torch.ones(2, 5))),
        lorac.AdapterError,
        "adapter 'mine': lora_A at 'up' has shape (2, 5), expected (2, 4)\n"
        "  use the rank and the base model of the training; the site is linear 4 -> 6",
    ),
    "no value to read": (
        good(variant=Listener(targets=["up"], of="base:dwn"), tensors={"up": {"factor": torch.ones(1)}}),
        lorac.SiteError,
        "'base:dwn' is not a value of the program\n  nearest: down\n"
        "  name values <module>, in:<module>, base:<module>, pass:<name>:<module>, weight:<site>, param:<tensor>, "
        "input:<argument> or own:<what once computes>; lorac.sites(model) lists the sites",
    ),
    "no parameter": (
        good(replaced={"norm.weigth": torch.ones(4)}),
        lorac.SiteError,
        "adapter 'mine' replaces 'norm.weigth', which the model does not have\n  nearest: norm.weight\n"
        "  load the class of model that the adapter was trained on",
    ),
    "another parameter": (
        good(replaced={"norm.weight": torch.ones(5)}),
        lorac.AdapterError,
        "adapter 'mine' replaces 'norm.weight' by a tensor of shape (5,), and the model's has (4,)\n"
        "  load the base model that the adapter was trained on",
    ),
    "a number for a bias": (
        good(replaced={"norm.bias": torch.ones(())}),
        lorac.AdapterError,
        "adapter 'mine' replaces 'norm.bias' by a tensor of shape (), and the model's has (4,)\n"
        "  load the base model that the adapter was trained on",
    ),
    "another vocabulary of another width": (
        good(replaced={"table.weight": torch.ones(7, 3)}),
        lorac.AdapterError,
        "adapter 'mine' replaces 'table.weight' by a tensor of shape (7, 3), and the model's has (5, 4)\n"
        "  load the base model that the adapter was trained on",
    ),
    "a copy of no parameter": (
        good(provenance={"copies": {"table.wait": compute_tensor_hash(torch.ones(5, 4))}}),
        lorac.SiteError,
        "adapter 'mine' replaces 'table.wait', which the model does not have\n  nearest: table.weight\n"
        "  load the class of model that the adapter was trained on",
    ),
    "a copy of another base": (
        good(provenance={"copies": {"table.weight": compute_tensor_hash(torch.ones(5, 4))}}),
        lorac.AdapterError,
        "adapter 'mine' was saved with a copy of 'table.weight', and this model's differs\n"
        "  load the base it was trained on; if its vocabulary was resized, "
        "copy the saved embedding into the model first",
    ),
    "whole numbers": (
        good(tensors=at("up", lora_A=torch.ones(2, 4, dtype=torch.int64))),
        lorac.AdapterError,
        "adapter 'mine': lora_A at 'up' is torch.int64, and the method takes floating-point numbers\n"
        "  save the adapter again in the dtype it was trained in",
    ),
    "complex numbers": (
        good(tensors=at("up", lora_B=torch.ones(6, 2, dtype=torch.complex64))),
        lorac.AdapterError,
        "adapter 'mine': lora_B at 'up' is torch.complex64, and the method takes floating-point numbers\n"
        "  save the adapter again in the dtype it was trained in",
    ),
    "positions that are fractions": (
        shira(torch.zeros(2, 10)),
        lorac.AdapterError,
        "adapter 'mine': indices at 'up' is torch.float32, and the method takes whole numbers\n"
        "  save the adapter again in the dtype it was trained in",
    ),
    "a position outside": (
        shira(torch.stack([torch.arange(10) % 6, torch.arange(10) % 5])),
        lorac.AdapterError,
        "adapter 'mine': indices at 'up' holds (4, 4), outside the shape (6, 4)\n"
        "  load the base model that the adapter was trained on",
    ),
    "a negative position": (
        shira(torch.stack([torch.arange(10) % 6 - 1, torch.arange(10) % 4])),
        lorac.AdapterError,
        "adapter 'mine': indices at 'up' holds (-1, 0), outside the shape (6, 4)\n"
        "  load the base model that the adapter was trained on",
    ),
    "a position twice": (
        shira(torch.stack([torch.arange(10) % 3, torch.arange(10) % 4 % 3])),
        lorac.AdapterError,
        "adapter 'mine': 2 positions of indices at 'up' are given twice\n"
        "  load the base model that the adapter was trained on",
    ),
    "a replacement of whole numbers": (
        good(replaced={"norm.weight": torch.ones(4, dtype=torch.int32)}),
        lorac.AdapterError,
        "adapter 'mine': the replacement of 'norm.weight' is torch.int32, and the method takes torch.float32 there\n"
        "  save the adapter again in the dtype it was trained in",
    ),
    "no hash of a base": (
        good(provenance={"base": "flaot32:" + 32 * "0"}),
        lorac.AdapterError,
        f"adapter 'mine' records 'flaot32:{32 * '0'}' as the hash of its base weights, and lorac writes no such hash\n"
        "  copy or download the file again: it was changed",
    ),
    "another base": (
        good(provenance={"base": compute_base_hash(ModelView.of(other_base()), ["up"])}),
        lorac.AdapterError,
        "adapter 'mine' was made for other base weights: "
        f"it recorded {compute_base_hash(ModelView.of(other_base()), ['up'])}, "
        f"this model has {compute_base_hash(ModelView.of(model()), ['up'])} at the 1 adapted "
        "sites\n  load the base model, and the revision of it, that the adapter was trained on",
    ),
}
"""Fault -> an adapter that has it, and what it is refused with."""


def compiling(adapter: lorac.Adapter, folder: Path) -> None:
    lorac.compile(model(), {NAME: adapter})


def adding(adapter: lorac.Adapter, folder: Path) -> None:
    lorac.compile(model(), [lorac.LoRA(r=4, targets=["up"], modules_to_save=["norm"])]).add_adapter(adapter)


def compiling_a_file(adapter: lorac.Adapter, folder: Path) -> None:
    lorac.save_adapter(adapter, folder / "file", format="native")
    lorac.compile(model(), [folder / "file"])


def loading(adapter: lorac.Adapter, folder: Path) -> None:
    lorac.save_adapter(adapter, folder / "file", format="native")
    lorac.load_adapter(folder / "file", model())


def saving(adapter: lorac.Adapter, folder: Path) -> None:
    lorac.save_adapter(adapter, folder / "file", format="native", model=model())


WAYS = pytest.mark.parametrize("way", [compiling, adding, compiling_a_file, loading, saving])
Way = Callable[[lorac.Adapter, Path], None]


@WAYS
@pytest.mark.parametrize("fault", FAULTS)
def test_raises_the_same_error_for_a_fault_on_every_way(fault: str, way: Way, tmp_path: Path) -> None:
    adapter, kind, text = FAULTS[fault]
    with pytest.raises(LoracError) as raised:
        way(adapter, tmp_path)
    assert type(raised.value) is kind
    assert str(raised.value) == text


def test_rejects_another_vocabulary_where_nothing_is_compiled(tmp_path: Path) -> None:
    adapter = good(replaced={"table.weight": torch.ones(7, 4)})
    for way in (compiling, loading, saving):
        way(adapter, tmp_path)
    with pytest.raises(lorac.AdapterError) as raised:
        lorac.merge_into(model(), [adapter])
    assert str(raised.value) == (
        "adapter 'mine' replaces 'table.weight' by a tensor of shape (7, 4), and the model's has (5, 4)\n"
        "  load the model with 7 rows there, the num_labels of a classifier, or call model.resize_token_embeddings(7); "
        "lorac.compile also takes a whole layer of another size"
    )


@WAYS
def test_accepts_an_adapter_that_fits(way: Way, tmp_path: Path) -> None:
    own = model()
    replaced = {"norm.weight": torch.ones(4)}
    copies = {"table.weight": compute_tensor_hash(own.get_parameter("table.weight"))}
    way(
        good(replaced=replaced, provenance={"base": compute_base_hash(ModelView.of(own), ["up"]), "copies": copies}),
        tmp_path,
    )


BAD = torch.tensor([[1, torch.nan, 3, torch.inf]])


@WAYS
@pytest.mark.parametrize(
    ("adapter", "name", "values"),
    [
        (good(tensors=at("up", lora_A=BAD.expand(2, 4))), "up.lora_A", "4 NaN or infinite of 8"),
        (good(replaced={"norm.weight": BAD[0]}), "norm.weight", "2 NaN or infinite of 4"),
    ],
    ids=["of a site", "replaced"],
)
def test_rejects_tensors_that_are_not_finite(
    adapter: lorac.Adapter, name: str, values: str, way: Way, tmp_path: Path
) -> None:
    with refuses("non_finite") as raised:
        way(adapter, tmp_path)
    assert str(raised.value) == (
        f"tensor '{name}' of adapter 'mine' holds {values} values\n  its training diverged: take an earlier checkpoint"
    )


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        (lorac.LoRA(r=2, alpha=float("nan"), targets=["up"]), "alpha"),
        (lorac.LoRA(r=2, alpha_pattern={"up": float("inf")}, targets=["up"]), "alpha_pattern"),
        (lorac.Chain(parts=(lorac.LoRA(r=2, alpha=-float("inf")),), targets=["up"]), "parts"),
    ],
)
@WAYS
def test_rejects_hyper_parameters_that_are_not_finite(variant: Any, field: str, way: Way, tmp_path: Path) -> None:
    """A file cannot hold them, so that saving one refuses them too."""
    adapter = good(variant=variant)
    with pytest.raises((lorac.AdapterError, lorac.FormatError), match=rf"'{field}' of adapter|finite"):
        way(adapter, tmp_path)


def test_rejects_a_swap_to_an_adapter_that_has_diverged() -> None:
    compiled = lorac.compile(model(), {NAME: good()})
    with torch.no_grad():
        compiled.adapters[NAME].tensors["up"]["lora_A"][1, 2] = torch.nan
    with refuses("non_finite", match=r"'up\.lora_A' of adapter 'mine' holds 1 NaN"):
        compiled.swap(NAME)


class Packed(nn.Parameter):
    """Stands for a quantised weight: its numbers are not the base's."""


def test_computes_no_hash_of_a_quantised_weight() -> None:
    quantised = model()
    quantised.up.weight = Packed(torch.zeros(6, 4))  # type: ignore[union-attr]
    assert lorac.sites(quantised)["up"].packed == "Packed"
    lorac.compile(quantised, {NAME: good(provenance={"base": compute_base_hash(ModelView.of(model()), ["up"])})})
