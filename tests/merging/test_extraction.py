"""Extracts: a base and its extract are the tuned model, in NumPy and through transformers, from models and folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from lorac.testing import assert_close, assert_parity
from tests.refusing import refuses
from tests.zoo import ZOO


class Net(nn.Module):
    """A linear layer, a convolution, a grouped one, an embedding with the output layer tied to it, and a norm."""

    def __init__(self, *, tied=True, width=8):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, width, 1, groups=2)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.linear(self.embed(ids)))
        return self.head(self.grouped(self.conv(x.transpose(1, 2))).transpose(1, 2))


IDS = torch.arange(10).reshape(2, 5)


@torch.no_grad()
def tuned(base, *names, seed=1):
    """A copy with some tensors, or all, moved a little."""
    made = type(base)(tied=base.head.weight is base.embed.weight).to(base.linear.weight.dtype)
    made.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if not names or name in names:
            parameter.add_(0.03 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def assert_makes(adapter, base, wanted):
    compiled = lorac.compile(base, {"a": adapter}, example_inputs=(IDS,))
    assert_parity(compiled(IDS), wanted(IDS), base(IDS))


def test_exactly():
    base = Net().double()
    other = tuned(base)
    adapter = lorac.extract(other, base, name="a")
    assert adapter.variant.name == "edit"
    assert set(adapter.tensors) == {"embed", "head", "linear", "conv", "grouped"}
    assert set(adapter.replaced) == {"norm.weight", "norm.bias"}
    assert_makes(adapter, base, other)


def test_leaves_equal_tensors_out():
    base = Net().double()
    other = tuned(base, "linear.weight", "conv.bias")
    adapter = lorac.extract(other, base)
    assert {path: [*tensors] for path, tensors in adapter.tensors.items()} == {"linear": ["delta"], "conv": ["e"]}
    assert not adapter.replaced
    assert_makes(adapter, base, other)


@torch.no_grad()
def test_the_nearest_lora_of_a_rank():
    base = Net().double()
    other = tuned(base)
    adapter = lorac.extract(other, base, rank=3)
    assert adapter.variant.name == "lora"
    for path, site in lorac.sites(base).items():
        first, second = (site.present(model.get_parameter(site.weight)).numpy() for model in (other, base))
        u, s, vh = np.linalg.svd(first - second)
        at = adapter.tensors[path]
        assert_close(at["lora_B"] @ at["lora_A"], torch.from_numpy((u[:, :3] * s[:3]) @ vh[:3]))
        error = np.linalg.norm(s[3:]) / np.linalg.norm(s)
        assert_close(torch.tensor(adapter.provenance["errors"][path], dtype=torch.float64), torch.tensor(error))


def test_a_tolerance():
    base = Net().double()
    other = tuned(base)
    adapter = lorac.extract(other, base, tolerance=0.5)
    assert all(0 < error <= 0.5 for error in adapter.provenance["errors"].values())
    assert_makes(lorac.extract(other, base, tolerance=0.0), base, other)
    with refuses("not_mergeable", match=r"rank 1 leaves out 0\.\d+ of the change of"):
        lorac.extract(other, base, rank=1, tolerance=0.1)


def test_half_precision_is_subtracted_in_float32():
    base = Net().to(torch.bfloat16)
    other = tuned(base)
    adapter = lorac.extract(other, base)
    assert adapter.tensors["linear"]["delta"].dtype is torch.float32
    assert torch.equal(base.linear.weight.float() + adapter.tensors["linear"]["delta"], other.linear.weight.float())


def test_a_tied_weight_that_the_tuned_model_unties():
    base = Net().double()
    other = Net(tied=False).double()
    other.load_state_dict(base.state_dict())
    with torch.no_grad():
        other.head.weight.add_(0.1 * torch.randn_like(other.head.weight))
    adapter = lorac.extract(other, base)
    assert [*adapter.tensors] == ["head"]
    assert_makes(adapter, base, other)


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tied Llama in shards, and a tuned one in others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = ZOO["tiny_llama"].fresh()
    base.save_pretrained(folder / "base", max_shard_size="50KB")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    base.save_pretrained(folder / "tuned", max_shard_size="120KB")
    assert len([*(folder / "base").glob("*.safetensors")]) > 2
    return folder


@torch.no_grad()
def test_folders(folders, tmp_path):
    adapter = lorac.extract(folders / "tuned", folders / "base")
    assert adapter.name == "tuned"
    lorac.save_adapter(adapter, tmp_path / "edit", format="native")
    base, other = (type(ZOO["tiny_llama"].model()).from_pretrained(folders / name) for name in ("base", "tuned"))
    merged = lorac.merge_into(base, {"a": tmp_path / "edit"})
    for (name, found), (_, wanted) in zip(merged.named_parameters(), other.named_parameters(), strict=True):
        assert_close(found, wanted), name


@torch.no_grad()
def test_a_lora_of_two_folders_is_that_of_the_models(folders):
    base, other = (type(ZOO["tiny_llama"].model()).from_pretrained(folders / name) for name in ("base", "tuned"))
    stored = lorac.extract(folders / "tuned", folders / "base", rank=2)
    loaded = lorac.extract(other, base, rank=2)
    assert [*stored.tensors] == [*loaded.tensors]
    for path, tensors in stored.tensors.items():
        assert all(torch.equal(tensors[name], tensor) for name, tensor in loaded.tensors[path].items())
    assert all(torch.equal(stored.replaced[name], tensor) for name, tensor in loaded.replaced.items())


def test_a_shard_is_missing_or_damaged(folders, tmp_path):
    shutil.copytree(folders / "tuned", tmp_path / "tuned")
    first = sorted((tmp_path / "tuned").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(lorac.FormatError):
        lorac.extract(tmp_path / "tuned", folders / "base", rank=2)
    first.unlink()
    with pytest.raises(lorac.FormatError, match=first.name):
        lorac.extract(tmp_path / "tuned", folders / "base", rank=2)


def test_rejects_nan(folders, tmp_path):
    shutil.copytree(folders / "tuned", tmp_path / "tuned")
    first = sorted((tmp_path / "tuned").glob("*.safetensors"))[0]
    tensors = load_file(first)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, first, metadata={"format": "pt"})
    with refuses("non_finite", match="NaN"):
        lorac.extract(tmp_path / "tuned", folders / "base")


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_refusals(folders, tmp_path):
    base = Net()
    with pytest.raises(lorac.AdapterError, match="the same weights"):
        lorac.extract(base, Net())
    with refuses(
        "shape_mismatch", match=r"'embed' has shape \(11, 10\) in the tuned model and \(11, 8\) in the base"
    ) as error:
        lorac.extract(Net(width=10), base)
    assert "vocabulary" not in str(error.value)
    with refuses("shape_mismatch", match="resize_token_embeddings"):
        lorac.extract(nn.Sequential(nn.Embedding(9, 4)), nn.Sequential(nn.Embedding(8, 4)))
    with refuses("site_not_found", match="the tuned model has no layer '.+', which the other has"):
        lorac.extract(nn.Sequential(nn.Linear(3, 2)), base)
    with refuses("shape_mismatch", match="the tensor 'more' of one of the models is missing in the other"):
        more = tuned(base)
        more.register_parameter("more", nn.Parameter(torch.ones(2)))
        lorac.extract(more, base)
    with pytest.raises(lorac.OptionError, match="rank 0"):
        lorac.extract(tuned(base), base, rank=0)
    with pytest.raises(lorac.LoracError, match="nowhere"):
        lorac.extract(tmp_path / "nowhere", base)
    shutil.copytree(folders / "tuned", tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    (tmp_path / "packed/config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with refuses("not_mergeable", match="quantised"):
        lorac.extract(tmp_path / "packed", folders / "base")


@torch.no_grad()
def test_peft_reads_an_extract_that_no_model_was_loaded_for(folders, tmp_path):
    """Embeddings, tied ones, and norms as modules_to_save."""
    peft = pytest.importorskip("peft")
    adapter = lorac.extract(folders / "tuned", folders / "base", rank=8)
    lorac.save_adapter(adapter, tmp_path / "peft")
    base, other = (type(ZOO["tiny_llama"].model()).from_pretrained(folders / "base").double() for _ in range(2))
    inputs = ZOO["tiny_llama"].inputs()
    reference = peft.PeftModel.from_pretrained(other, tmp_path / "peft").eval()(**inputs)
    plain = base(**inputs)
    assert_parity(lorac.compile(base, {"a": tmp_path / "peft"})(**inputs), reference, plain, names=["logits"])


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@torch.no_grad()
def test_peft_reads_an_extract_of_biases_and_an_embedding(tmp_path):
    """PEFT has no lora_bias at an embedding: biases are replaced."""
    peft = pytest.importorskip("peft")
    entry = ZOO["tiny_gpt2"]
    base, other = entry.fresh(), entry.fresh()
    for name, parameter in other.named_parameters():
        torch.manual_seed(len(name))
        if parameter.ndim == 2:
            parameter.add_(0.02 * torch.randn(len(parameter), 1) * torch.randn(parameter.shape[1]))
        elif name.endswith("bias"):
            parameter.add_(0.02 * torch.randn_like(parameter))
    adapter = lorac.extract(other, base, rank=2)
    assert not adapter.variant.lora_bias
    lorac.save_adapter(adapter, tmp_path / "peft", model=base)
    reference = peft.PeftModel.from_pretrained(entry.fresh(), tmp_path / "peft").eval()(**entry.inputs()).logits
    plain, wanted = (model(**entry.inputs()).logits for model in (base, other))
    assert_parity(reference, wanted, plain)
    assert_parity(lorac.compile(base, {"a": tmp_path / "peft"})(**entry.inputs()).logits, wanted, plain)
