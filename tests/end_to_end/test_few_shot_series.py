"""LLMFew as the example builds it: the paper's shapes and masks, training, deployment."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import lorac
from examples import few_shot_series, llmfew
from examples.llmfew import Head, LLMFew, PatchEncoder, patched, patches
from lorac.testing import assert_close
from tests.parity import assert_parity

CHANNELS, LENGTH, PATCH, STRIDE, WIDTH, CLASSES = 3, 22, 6, 4, 16, 5
COUNT = patches(LENGTH, PATCH, STRIDE)
LORA = lorac.LoRA(r=3, alpha=6, targets=["q_proj", "k_proj", "v_proj"], modules_to_save=["encoder", "head"])


@pytest.fixture
def host() -> LLMFew:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=777,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    encoder = PatchEncoder(CHANNELS, WIDTH, PATCH, STRIDE, hidden=7, depth=2, reduced=9)
    return LLMFew(encoder, transformers.LlamaModel(config), Head(COUNT, WIDTH, CLASSES)).eval()


def series(rows: int) -> torch.Tensor:
    return torch.randn(rows, CHANNELS, LENGTH, generator=torch.Generator().manual_seed(rows))


def fitted(host: LLMFew, steps: int = 4) -> lorac.Compiled:
    """The host compiled in eager and trained a little."""
    compiled = lorac.compile(host, {"few": LORA}, example_inputs=(series(2),)).train()
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(series(CLASSES)), torch.arange(CLASSES)).backward()
        optimizer.step()
    return compiled.eval()


def test_patches_are_cut_as_the_paper_cuts_them():
    cut = patched(torch.arange(1.0, 9.0).reshape(1, 1, 8), 4, 2)
    assert cut[0, :, 0].tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [7, 8, 8, 8]]
    assert patches(8, 4, 2) == 4
    assert patches(400, 32, 16) == 25


def test_a_patch_sees_itself_alone(host: LLMFew):
    changed = series(1)
    changed[..., :STRIDE] += 1
    first, second = host.encoder(series(1)), host.encoder(changed)
    assert not torch.equal(first[:, 0], second[:, 0])
    assert torch.equal(first[:, 1:], second[:, 1:])


def test_features_see_no_later_sample_and_as_far_back_as_the_dilations_reach():
    torch.manual_seed(0)
    depth, length = 3, 100
    blocks = PatchEncoder(2, 4, depth=depth, hidden=4, reduced=4).blocks.double()
    x = torch.randn(1, 2, length, dtype=torch.float64, requires_grad=True)
    blocks(x)[0, :, -10].sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero()[:, 0]
    reach = 1 + 2 * (llmfew.KERNEL - 1) * (2 ** (depth + 1) - 1)
    assert (int(seen.min()), int(seen.max())) == (length - 10 - reach + 1, length - 10)


def test_filters_are_weight_normed_as_torch_norms_them():
    torch.manual_seed(0)
    ours = llmfew.CausalConv(3, 5, dilation=2)
    theirs = weight_norm(nn.Conv1d(3, 5, llmfew.KERNEL, dilation=2, padding=ours.earlier))
    with torch.no_grad():
        ours.weight_g.mul_(1.7)
        theirs.bias.copy_(ours.bias)
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
        x = torch.randn(2, 3, 11)
        assert_close(ours(x), nn.functional.leaky_relu(theirs(x)[..., : -ours.earlier]))


def test_states_see_no_later_patch_and_logits_see_all(host: LLMFew):
    embeddings = host.encoder(series(1))
    changed = embeddings.clone()
    changed[:, -1] += 1
    assert_close(host.states(embeddings)[:, :-1], host.states(changed)[:, :-1])
    assert not torch.equal(host.head(host.states(embeddings), embeddings), host.head(host.states(changed), embeddings))


def test_the_head_adds_embeddings_before_the_norm(host: LLMFew):
    states, embeddings = torch.randn(2, 2, COUNT, WIDTH).unbind()
    both = nn.functional.leaky_relu(states + embeddings).reshape(2, -1)
    assert_close(host.head(states, embeddings), host.head.linear(host.head.layer_norm(both)))


def test_training_moves_encoder_head_and_lora_and_nothing_else(host: LLMFew):
    before = copy.deepcopy(host.state_dict())
    base = host(series(4))
    compiled = lorac.compile(host, {"few": LORA}, example_inputs=(series(2),))
    assert_close(compiled(series(4)), base)
    adapter = fitted(host).adapters["few"]
    assert all(torch.equal(before[name], tensor) for name, tensor in host.state_dict().items())
    whole = {name for name in before if name.startswith(("encoder.", "head."))}
    assert adapter.replaced.keys() == whole
    assert all(not torch.equal(before[name], tensor) for name, tensor in adapter.replaced.items())


SLOW = pytest.mark.slow


@pytest.mark.slow("the answers in eager, and test_conforms of its method on ONNX Runtime")
@pytest.mark.parametrize("mode", ["live", pytest.param("fused", marks=SLOW), pytest.param("baked", marks=SLOW)])
def test_deploys_without_the_table_of_tokens(host: LLMFew, mode: str, tmp_path):
    eager = fitted(host)
    eager.export(target="onnxruntime", mode=mode).save(tmp_path)
    engine = lorac.load(tmp_path)
    with torch.no_grad():
        base, reference = eager(series(7), adapters=None), eager(series(7))
        assert_parity(engine(series(7)), reference, base)
        if mode != "baked":
            engine.swap(None)
            assert_close(engine(series(7)), base)
    graph = onnx.load(str(next(tmp_path.rglob("*.onnx"))), load_external_data=False).graph
    assert 777 not in {size for tensor in graph.initializer for size in tensor.dims}


def test_returns_the_chance_of_equal_signs():
    assert few_shot_series.chance([0.1] * 10) == 2 / 1024
    assert few_shot_series.chance([0.1, -0.1]) == 1


@pytest.mark.slow
def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["few_shot_series", "--seeds", "1", "--workers", "1"])
    few_shot_series.main()
    assert "does not separate" in capsys.readouterr().out
