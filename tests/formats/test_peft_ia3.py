"""peft_type IA3: the side of each vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorac import IA3, Adapter, load_adapter, save_adapter
from tests.peft_files import configure, load_peft, save_small
from tests.refusing import refuses
from tests.zoo import ZOO


def test_the_vector_must_be_for_the_configured_side(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "IA3")
    for wrong in (["up"], None, ["up", "down"]):
        configure(folder, feedforward_modules=wrong)
        with refuses("shape_mismatch", match="feedforward_modules"):
            load_adapter(folder)
    configure(folder, feedforward_modules=".*own")
    assert load_adapter(folder).tensors["down"]["ia3_l"].shape == (1, 14)


@pytest.mark.parametrize(
    "variant",
    [
        IA3(targets=("model.layers.0.mlp.down_proj", "k_proj"), feedforward=("down_proj",)),
        IA3(targets=("down_proj", "k_proj"), feedforward=("down_proj",), layers=(1,)),
        IA3(targets=("down_proj", "k_proj")),
    ],
)
def test_peft_reads_saved_adapters(tmp_path: Path, variant: IA3) -> None:
    """PEFT wants feedforward_modules to be among target_modules, letter by letter, and has no layers to choose."""
    model = ZOO["tiny_llama"].fresh(torch.float64)
    paths = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.k_proj", "mlp.down_proj")]
    chosen = [p for p in paths if not (variant.layers and ".1." not in p)]
    chosen = [p for p in chosen if "k_proj" in p or "down_proj" in variant.targets or ".0." in p]
    sides = {"k_proj": (48, 1), "down_proj": (1, 96) if variant.feedforward else (64, 1)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        path: {"ia3_l": 1 + 0.1 * torch.randn(sides[path.rpartition(".")[2]], generator=generator).double()}
        for path in chosen
    }
    save_adapter(Adapter("a", variant, tensors), tmp_path / "a", model=model)
    oracle = load_peft(model, tmp_path / "a")
    adapted = {n.removeprefix("base_model.model.").removesuffix(".ia3_l.default") for n in oracle.state_dict()}
    assert adapted & set(paths) == set(chosen)
    again = load_adapter(tmp_path / "a", model)
    assert set(again.tensors) == set(chosen)
    for path in chosen:
        assert torch.equal(again.tensors[path]["ia3_l"], tensors[path]["ia3_l"])
