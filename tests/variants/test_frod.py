"""FRoD: its bases against PEFT's, the layers that share one, and files that lack them."""

import pytest
import torch
from peft import FrodConfig, PeftModel, get_peft_model
from torch import nn

import lorac
from lorac import FRoD
from lorac.testing import assert_close
from lorac.variants.frod import role_of
from tests.peft_files import save_small
from tests.refusing import refuses
from tests.zoo import ZOO


class Blocks(nn.Module):
    """Some blocks with an `up`, and a `head`."""

    def __init__(self, count, width):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(width, width)})}) for _ in range(count)
            )
            self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.layers:
            x = block["mlp"]["up"](x)
        return self.head(x)


def test_bases_are_peft_s():
    """Layers of one role share a basis, which is that of the SVD where they have fewer rows than columns."""
    config = FrodConfig(target_modules=["up", "head"], sparse_rate=0.2, progressbar=False)
    wrapped = get_peft_model(Blocks(3, 6), config).base_model
    adapter = lorac.compile(Blocks(3, 6), {"a": FRoD(targets=("up", "head"), sparse_rate=0.2)}).adapters["a"]
    assert len({id(tensors["frod_V"]) for tensors in adapter.tensors.values()}) == 2
    for path, tensors in adapter.tensors.items():
        layer = wrapped.model.get_submodule(path)
        assert_close(tensors["frod_V"].abs(), wrapped.frod_V[role_of(path)]["default"].abs())  # signs are LAPACK's
        assert_close(tensors["frod_lambda_l"].detach(), layer.frod_lambda_l["default"].detach())
        assert tensors["frod_lambda_s_values"].shape == layer.frod_lambda_s_values["default"].shape


@torch.no_grad()
def test_starts_as_the_base_and_trains_no_diagonal_twice():
    model, x = Blocks(2, 6), torch.randn(4, 6)
    compiled = lorac.compile(model, {"a": FRoD(targets=("up",), sparse_rate=1.0)})
    assert_close(compiled(x), model(x))
    rows, columns = compiled.adapters["a"].tensors["layers.0.mlp.up"]["frod_s_indices"]
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 30
    assert not (rows == columns).any()


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("head", "head"),
        ("layers.3.up", "up"),
        ("model.layers.0.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.1.attention.output.dense", "attention_output"),
        ("encoder.layer.1.output.dense", "output_dense"),
        ("output.dense", "output_dense"),
    ],
)
def test_roles_are_peft_s(path, role):
    from peft.tuners.frod.model import _category_from_key

    assert role_of(path) == role == _category_from_key(path)


@torch.no_grad()
def test_peft_computes_alike_in_half_precision(tmp_path):
    torch.manual_seed(0)
    model, x = Blocks(2, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    compiled = lorac.compile(model, {"a": FRoD(targets=("up",), sparse_rate=0.5)})
    for tensors in compiled.adapters["a"].tensors.values():
        tensors["frod_lambda_s_values"].normal_(std=0.25)
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "a", model=model)
    base, found = model(x).float(), compiled(x).float()
    theirs = PeftModel.from_pretrained(Blocks(2, 6).bfloat16(), str(tmp_path / "a")).eval()(x).float()
    assert (theirs - found).norm() < 0.05 * (found - base).norm()  # of factors with 8 bits


def test_rejects_files_without_bases(tmp_path):
    model = ZOO["plain_mlp"].model()
    folder = save_small(tmp_path / "a", "FROD", save_projection=False)
    with refuses("unsupported_field", match="save_projection=True"):
        lorac.load_adapter(folder, model)
    whole = save_small(tmp_path / "b", "FROD")
    with refuses("base_needed", match="pass model="):
        lorac.load_adapter(whole)
    adapter = lorac.load_adapter(whole, model)
    adapter.tensors["up"]["frod_U"] = 2 * adapter.tensors["up"]["frod_U"]
    with refuses("unsupported_field", match="'frod_U' at 'up' is not the one that PEFT computes"):
        lorac.save_adapter(adapter, tmp_path / "c", model=model)
