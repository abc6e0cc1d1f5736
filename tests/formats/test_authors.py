"""Authors' own files, written by hand in the layout of their code, against the results of that code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import lorac
from campaigns import sound
from lorac.testing import assert_close
from tests.formats.oracle import assert_equal
from tests.refusing import refuses

Tensors = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def draw(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs).double()


class Block(nn.Module):
    """A block with the layers that authors adapt, by the names of their models."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"proj": linear(6, 6)})
        self.mlp = nn.ModuleDict({"fc2": linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["fc2"](torch.tanh(self.attn["proj"](x)))


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def in_place(model: nn.Module, path: str, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Put a layer of the authors' code in the place of one of the model's."""
    own = model.get_submodule(path)

    class Adapted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(own, x)

    parent, _, leaf = path.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.ModuleDict | nn.ModuleList):
        holder[int(leaf) if isinstance(holder, nn.ModuleList) else leaf] = Adapted()  # type: ignore[index]
    else:
        setattr(holder, leaf, Adapted())


def hydra(model: nn.Module, folder: Path) -> None:
    """Equation: y = z + s·(par(x) + seq(z)), each with biases between its factors."""
    tensors: Tensors = {"head.weight": draw(4, 6), "head.bias": draw(4)}
    for layer, stem in (("mlp.fc2", "mlp.hydra_mlp"), ("attn.proj", "attn.hydra_proj")):
        own = {f"{half}.{leaf}": draw(*shape) for half, leaf, shape in HYDRA}
        tensors |= {f"blocks.1.{stem}_{key}": tensor for key, tensor in own.items()}

        def forward(base: nn.Module, x: Tensor, own: Tensors = own) -> Tensor:
            def bottleneck(value: Tensor, name: str) -> Tensor:
                down = F.linear(value, own[f"{name}.down_proj.weight"], own[f"{name}.down_proj.bias"])
                return F.linear(down, own[f"{name}.up_proj.weight"], own[f"{name}.up_proj.bias"])

            z = base(x)
            return z + 1.5 * (bottleneck(x, "par") + bottleneck(z, "seq"))

        in_place(model, f"blocks.1.{layer}", forward)
    model.head.weight.data, model.head.bias.data = tensors["head.weight"], tensors["head.bias"]
    torch.save(tensors, folder / "cifar.pt")
    (folder / "cifar.json").write_text('{"scale": 1.5}')


HYDRA = [
    (f"{branch}.{half}_proj", leaf, shape)
    for branch in ("par", "seq")
    for half, leaf, shape in (
        ("down", "weight", (2, 6)), ("down", "bias", (2,)), ("up", "weight", (6, 2)), ("up", "bias", (6,)),
    )
]  # fmt: skip


def adaptertune(model: nn.Module, folder: Path) -> None:
    """Equation: y = h + α·(GELU(h·Dᵀ + p)·Uᵀ + q); the whole model is in the file, blocks one level deeper."""
    whole = {key.replace("blocks.0.", "blocks.0.block.").replace("blocks.1.", "blocks.1.block."): tensor
             for key, tensor in model.state_dict().items()}  # fmt: skip
    own = {"down.weight": draw(2, 6), "down.bias": draw(2), "up.weight": draw(6, 2), "up.bias": draw(6)}

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        h = block(x)
        hidden = F.gelu(F.linear(h, own["down.weight"], own["down.bias"]))
        return h + 0.7 * F.linear(hidden, own["up.weight"], own["up.bias"])

    in_place(model, "blocks.0", forward)
    tensors = {**whole, **{f"blocks.0.adapter.{key}": tensor for key, tensor in own.items()}}
    torch.save(
        {"model": tensors, "optimizer": {"state": {0: {"step": torch.ones(())}}}, "epoch": 3}, folder / "last.pt"
    )
    (folder / "last.json").write_text('{"adapter_alpha": 0.7}')


def loldu(model: nn.Module, folder: Path) -> None:
    """Equation: W = W_res + σ·P·L_r·diag(z)·U_r with σ = α/r; only z is in the file."""
    z = draw(3)

    def forward(base: nn.Module, x: Tensor) -> Tensor:
        p, lower, upper = torch.linalg.lu(base.weight)
        diagonal = upper.diagonal()[:3]
        unit = upper[:3] / diagonal[:, None]
        weight = base.weight + p @ lower[:, :3] @ torch.diag(2 * z - 2 * diagonal) @ unit
        return F.linear(x, weight, base.bias)

    in_place(model, "blocks.0.attn.proj", forward)
    torch.save({"blocks.0.attn.proj.parametrizations.weight.0.vector_z": z}, folder / "z.pt")
    (folder / "z.json").write_text('{"alpha": 6}')


def sora(model: nn.Module, folder: Path) -> None:
    """Equation: y = z + (α/r)·((x·Aᵀ)∘g)·Bᵀ, with the gate as one row; a norm, here the head, is unfrozen."""
    a, b, gate = draw(3, 6), draw(6, 3), draw(1, 3)
    in_place(model, "blocks.0.mlp.fc2", lambda base, x: base(x) + 4 / 3 * ((x @ a.T) * gate) @ b.T)
    path = "blocks.0.mlp.fc2.lora"
    head = {"head.weight": draw(4, 6), "head.bias": draw(4)}
    model.head.load_state_dict({key.removeprefix("head."): tensor for key, tensor in head.items()})
    torch.save({f"{path}.lora_A": a, f"{path}.lora_B": b, f"{path}.gate": gate, **head}, folder / "pytorch_model.bin")
    config = {"lora_r": 3, "lora_alpha": 4, "unfrozen_modules": ["deltas", "head"], "delta_type": "lora"}
    (folder / "config.json").write_text(json.dumps(config))


def meteora(model: nn.Module, folder: Path) -> None:
    """Equation: y = z + s·Σ w_j·B_j·A_j·x over the top k of the gate; the base's own weights are in the file."""
    a, b, gate = draw(4, 6), draw(6, 4), draw(2, 6)
    path = "base_model.model.blocks.0.mlp.fc2"
    base = {f"base_model.model.{key}": tensor for key, tensor in model.state_dict().items() if "fc2" not in key}
    base |= {f"{path}.base_layer.weight": model.blocks[0].mlp["fc2"].weight.data.clone()}

    def forward(base: nn.Module, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ gate.T, -1)  # k is 2 of 2
        experts = [(x @ a[2 * j : 2 * j + 2].T) @ b[:, 2 * j : 2 * j + 2].T for j in range(2)]
        return base(x) + 1.5 * sum(weights[..., j : j + 1] * expert for j, expert in enumerate(experts))

    in_place(model, "blocks.0.mlp.fc2", forward)
    own = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b, f"{path}.moe_gate.weight": gate}
    save_file({**base, **own}, folder / "model.safetensors")
    (folder / "model.json").write_text('{"lora_alpha": 3, "top_k": 2}')


def bone(model: nn.Module, folder: Path) -> None:
    """Equation: W'ᵢⱼ = Wᵢⱼ·(I + Bᵢ) + Bᵢ on blocks."""
    blocks = draw(2, 3, 3)

    def forward(base: nn.Module, x: Tensor) -> Tensor:
        weight = base.weight.clone()
        for i in range(2):
            for j in range(2):
                part = base.weight[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
                weight[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] = part @ (torch.eye(3).double() + blocks[i]) + blocks[i]
        return F.linear(x, weight, base.bias)

    in_place(model, "blocks.0.attn.proj", forward)
    torch.save({"blocks.0.attn.proj.bone": blocks}, folder / "bone.pt")


def break_for_make(model: nn.Module, folder: Path) -> None:
    up, down = draw(6, 2), draw(2, 6)
    in_place(model, "blocks.0.attn.proj", lambda base, x: base(x) + x @ down.T @ up.T)
    path = "unet.unet.blocks.0.attn.proj.lora"
    save_file({f"{path}.up.weight": up, f"{path}.down.weight": down}, folder / "pytorch_lora_weights.safetensors")


AUTHORS = (adaptertune, bone, break_for_make, hydra, loldu, meteora, sora)


def written(author: Callable[[nn.Module, Path], None], folder: Path) -> nn.Module:
    """Return the authors' model, with their file in a folder."""
    folder.mkdir()
    theirs = make_model()
    author(theirs, folder)
    return theirs


@pytest.mark.parametrize("author", AUTHORS)
def test_authors_compute_the_same(author: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    theirs, model, x = written(author, tmp_path / "it"), make_model(), draw(3, 6)
    adapter = lorac.load_adapter(tmp_path / "it", model)
    with torch.no_grad():
        compiled = lorac.compile(model, {"a": adapter}, example_inputs=(x,))
        assert_close(compiled(x), theirs(x))
        assert not torch.equal(theirs(x), model(x))
    lorac.save_adapter(adapter, tmp_path / "again", author.__name__, model)
    again = lorac.load_adapter(tmp_path / "again", model, name=adapter.name)
    assert_equal(again, adapter)
    assert again.variant == adapter.variant


@pytest.mark.parametrize("author", [a for a in AUTHORS if a not in {bone, break_for_make}])
def test_rejects_missing_settings_with_a_next_step_that_works(
    author: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    """The next step works."""
    written(author, tmp_path / "it")
    [settings] = (tmp_path / "it").glob("*.json")
    told = json.loads(settings.read_text())
    settings.unlink()
    with refuses("unsupported_field", match="of its training") as error:
        lorac.load_adapter(tmp_path / "it", make_model())
    assert str(settings) in error.value.next_step
    step = json.loads(error.value.next_step.partition("training: ")[2])
    assert step.keys() <= told.keys()
    settings.write_text(json.dumps(step))
    assert lorac.load_adapter(tmp_path / "it", make_model()).sites if author is not sora else True
    settings.write_text(json.dumps({**told, "sharpness": 1}))
    with refuses("unknown_field", match="sharpness"):
        lorac.load_adapter(tmp_path / "it", make_model())


def test_copies_of_another_base(tmp_path: Path) -> None:
    for author in (adaptertune, meteora):
        written(author, tmp_path / author.__name__)
        other = make_model()
        other.blocks[1].attn["proj"].weight.data += 1
        with refuses("base_mismatch", match=r"blocks\.1\.attn\.proj\.weight"):
            lorac.load_adapter(tmp_path / author.__name__, other)


def test_rejects_loldu_on_another_model(tmp_path: Path) -> None:
    written(loldu, tmp_path / "it")
    adapter = lorac.load_adapter(tmp_path / "it", make_model())
    with refuses("base_needed"):
        lorac.load_adapter(tmp_path / "it")
    other = make_model()
    other.blocks[0].attn["proj"].weight.data += torch.eye(6)
    with refuses("unsupported_field", match=r"blocks\.0\.attn\.proj"):
        lorac.save_adapter(adapter, tmp_path / "again", "loldu", other)


def test_rejects_saving_methods_that_the_format_cannot_hold(tmp_path: Path) -> None:
    model, x = make_model(), draw(2, 6)

    def adapter(variant: lorac.Variant) -> lorac.Adapter:
        return lorac.compile(model, {"a": variant}, example_inputs=(x,)).adapters["a"]

    with refuses("unsupported_field", match="stores hydra"):
        lorac.save_adapter(adapter(lorac.LoRA(r=1, targets=["fc2"])), tmp_path / "a", "hydra", model)
    with refuses("unsupported_field", match="'parallel_down' at 'head'"):
        lorac.save_adapter(adapter(lorac.Hydra(r=1, targets=["head"])), tmp_path / "a", "hydra", model)
    with refuses("unsupported_field", match="scaling_factor"):
        lorac.save_adapter(adapter(lorac.LoLDU(r=1, targets=["fc2"], train_sigma=True)), tmp_path / "a", "loldu", model)
    with refuses("unsupported_field", match="head"):
        saved = lorac.LoLDU(r=1, targets=["fc2"], modules_to_save=["head"])
        lorac.save_adapter(adapter(saved), tmp_path / "a", "loldu", model)
    plp = adapter(lorac.PLP(r=1, targets=["fc2"], identity_init=True))
    with refuses("unsupported_field", match="frozen halves"):
        lorac.save_adapter(plp, tmp_path / "a", "break_for_make", model)


def test_bone_of_two_axes_is_miss(tmp_path: Path) -> None:
    torch.save({"blocks.0.attn.proj.bone": draw(2, 6)}, tmp_path / "bone.pt")
    assert lorac.load_adapter(tmp_path / "bone.pt", make_model()).variant.name == "miss"
    mixed = {"blocks.0.attn.proj.bone": draw(2, 6), "blocks.1.attn.proj.bone": draw(2, 3, 3)}
    torch.save(mixed, tmp_path / "mixed.pt")
    with refuses("unsupported_field", match="2 and 3 axes"):
        lorac.load_adapter(tmp_path / "mixed.pt", make_model())


def test_rejects_a_factor_with_one_axis(tmp_path: Path) -> None:
    path = "unet.unet.blocks.0.attn.proj.lora"
    save_file({f"{path}.up.weight": draw(6, 2), f"{path}.down.weight": draw(2)}, tmp_path / "a.safetensors")
    with refuses("corrupt_file", match="down at 'blocks.0.attn.proj', or that tensor has too few axes"):
        lorac.load_adapter(tmp_path / "a.safetensors", make_model())


def test_a_component_of_several(tmp_path: Path) -> None:
    """A file of a U-Net's layers fits a model that has the U-Net as a component."""
    written(break_for_make, tmp_path / "it")
    several = {"unet": make_model(), "other": linear(6, 6)}
    assert lorac.load_adapter(tmp_path / "it", several).sites == ("unet.blocks.0.attn.proj",)


def test_a_language_model_s_hydra(tmp_path: Path) -> None:
    model = sound.model("tiny_bert")
    stem = "bert.encoder.layer.0.output"
    width, inner = model.config.hidden_size, model.config.intermediate_size
    tensors = {
        "par.hydra_A": (2, inner),
        "par.hydra_B": (width, 2),
        "seq.hydra_A": (3, width),
        "seq.hydra_B": (width, 3),
    }
    torch.save({f"{stem}.hydra_{key}.weight": torch.randn(shape) for key, shape in tensors.items()}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text('{"scale": 2}')
    adapter = lorac.load_adapter(tmp_path / "a.pt", model)
    assert adapter.sites == (f"{stem}.dense",)
    assert (adapter.variant.r, adapter.variant.r_sequential, adapter.variant.branch_bias) == (2, 3, False)
