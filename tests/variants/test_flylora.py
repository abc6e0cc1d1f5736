"""FlyLoRA: the oracles of its paper, the buffer that a rule moves, and the case where all ranks are chosen."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import lorac
from lorac.testing import assert_close
from lorac.training.rule import Rule
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.away import away, drawn
from tests.variants.routers import X, host


def fly(**fields):
    return lorac.FlyLoRA(**{"r": 6, "top_k": 2, "alpha": 9, "targets": ["line"], **fields})


def hand(top_k=2, bias=(0, 0, 0, 0), absolute=False):
    """Ranks that read one input each, an output of ones, alpha/r = 2."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False)).double().eval()
    model[0].weight.data.zero_()
    variant = lorac.FlyLoRA(r=4, top_k=top_k, alpha=8, absolute=absolute, targets=["0"])
    tensors = {"lora_A": torch.eye(4), "lora_B": torch.ones(1, 4), "lora_topk_bias": torch.tensor(bias)}
    adapter = lorac.Adapter("f", variant, {"0": {name: tensor.double() for name, tensor in tensors.items()}})
    return lorac.compile(model, {"f": adapter}, aux=["chosen"])


@pytest.mark.parametrize(
    ("absolute", "bias", "chosen", "answer"),
    [
        (False, (0, 0, 0, 0), [1, 0, 1, 0], 8),
        (True, (0, 0, 0, 0), [1, 1, 0, 0], -2),
        (False, (0, 0, 0, 1), [1, 0, 0, 1], 7),
    ],
)
def test_the_hand_computed_choices(absolute, bias, chosen, answer):
    compiled = hand(bias=bias, absolute=absolute)
    found = compiled(torch.tensor([[3.0, -4.0, 1.0, 0.5]]).double())
    assert found.item() == answer
    assert compiled.aux["chosen"]["0"].tolist() == [chosen]


@pytest.mark.medium("a density that is given", keep=["*-21"])
@pytest.mark.parametrize(("density", "filled"), [(None, 64 * 2 // 6), (0.5, 32), (1e-9, 1), (1.0, 64)])
def test_rows_of_a_have_the_density(density, filled):
    model = torch.nn.Sequential(torch.nn.Linear(64, 5))
    adapter = lorac.compile(model, {"f": fly(targets=["0"], density=density)}).adapters["f"]
    a = adapter.tensors["0"]["lora_A"]
    assert (a != 0).sum(1).tolist() == [filled] * 6
    if filled > 1:
        assert len({tuple(row.nonzero().flatten().tolist()) for row in a}) == 6 or filled == 64
    assert [key for key, t in adapter.tensors["0"].items() if t.requires_grad] == ["lora_B"]


FORK = {"peft_type": "LORA", "r": 6, "lora_alpha": 9, "target_modules": ["line"], "init_lora_weights": "sparse"}


def of_fork(tmp_path, **changed):
    """A file as the authors' fork of PEFT writes it; what it holds."""
    adapter = away(fly(), host(), (X,), "f")
    held = {f"base_model.model.line.{key}": t.contiguous() for key, t in adapter.tensors["line"].items()}
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_topk_bias": "lora_topk_bias"}
    save_file({key.replace(own, names[own]): t for key, t in held.items() for own in names if key.endswith(own)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({**FORK, "top_k": 2, "bias_u": 0.01, **changed}))
    return adapter


def test_files_of_the_authors_fork_are_read_and_none_is_written(tmp_path):
    adapter, model = of_fork(tmp_path), host()
    found = lorac.load_adapter(tmp_path, model)
    assert found.variant == fly(detach_router=True)
    for key, tensor in adapter.tensors["line"].items():
        assert torch.equal(found.tensors["line"][key], tensor)
    with refuses("unsupported_field", match="PEFT has no type for 'flylora'"):
        lorac.save_adapter(found, tmp_path / "again", model=model)


def test_rejects_incomplete_files_of_the_fork(tmp_path):
    of_fork(tmp_path, init_lora_weights=True)
    with refuses("unsupported_field", match="top_k=2"):
        lorac.load_adapter(tmp_path, host())
    of_fork(tmp_path, init_lora_weights=True, top_k=None)
    with refuses("unused_tensors", match="lora_topk_bias"):
        lorac.load_adapter(tmp_path, host())


def test_a_projection_keeps_lengths_but_for_the_density():
    """The mean of |A·x|²/|x|² is ρ/r."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 2))
    a = lorac.compile(model, {"f": fly(r=64, top_k=16, targets=["0"])}).adapters["f"].tensors["0"]["lora_A"]
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    ratio = ((x @ a.T).square().sum(1) / x.square().sum(1)).mean()
    assert abs(ratio * 64 / 0.25 - 1) < 0.1


@torch.no_grad()
def test_updates_over_two_drawn_projections_hardly_meet():
    """Two tasks' ΔW with A drawn for each, beside the same two over one A."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 40))
    own = [drawn(fly(targets=["0"]), model, name).tensors["0"]["lora_B"] for name in "ab"]
    fresh = [lorac.compile(model, {n: fly(targets=["0"])}).adapters[n].tensors["0"]["lora_A"] for n in "ab"]

    def cosine(first, second):
        one, other = (own[0] @ first).flatten(), (own[1] + own[0]).mul(0.7) @ second
        return abs(float(torch.cosine_similarity(one, other.flatten(), 0)))

    assert cosine(*fresh) < 3 / math.sqrt(512) < cosine(fresh[0], fresh[0])


@pytest.mark.medium("another rank", cases=["2"])
@torch.no_grad()
@pytest.mark.parametrize("top_k", [2, 9])
def test_equals_a_lora_where_all_ranks_are_chosen(top_k):
    model = host()
    adapter = away(fly(r=2, top_k=top_k), model, (X,), "f")
    assert adapter.tensors["line"].keys() == {"lora_A", "lora_B"}
    lora = lorac.Adapter("l", lorac.LoRA(r=2, alpha=9, targets=["line"]), adapter.tensors)
    base = model(X)
    reference = lorac.compile(model, {"l": lora})(X)
    compiled = lorac.compile(model, {"f": adapter})
    assert not compiled.plans["line"].branches
    assert_parity(compiled(X), reference, base)
    for mode in ("fused", "baked"):
        assert_parity(lorac.compile(model, {"f": adapter}, mode=mode)(X), reference, base)
    assert_parity(lorac.compile(model, {"f": lorac.to_lora(adapter, model)})(X), reference, base)


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_a_choice_has_no_weight_form(mode):
    model = host()
    with refuses("not_mergeable", match=r"no weight form[\s\S]*lorac\.freeze_router"):
        lorac.compile(model, {"f": away(fly(), model, (X,), "f")}, mode=mode)


class Balance(Rule):
    """The paper's: d moves by u towards the ranks that are chosen less than the mean."""

    methods = (lorac.FlyLoRA,)
    governed = ("lora_B",)
    listens = ("chosen",)
    step = 0.25

    def __init__(self, compiled, optimizer):
        super().__init__(compiled, optimizer)
        self.biases = {term.site: term.tensors["lora_topk_bias"] for term in self.terms}
        self.attach()

    def hear(self, emitted):
        for path, chosen in emitted["chosen"].items():
            counts = chosen.flatten(0, -2).sum(0)
            self.biases[path].add_(self.step * (counts.mean() - counts).sign())


def test_a_rule_receives_the_chosen_ranks():
    compiled = hand().train()
    held = compiled.adapters["f"].tensors["0"]
    rule = Balance(compiled, torch.optim.SGD([held["lora_B"]], lr=0.0))
    x = torch.tensor([[3.0, 2, 1, 0], [3, 1, 2, 0], [3, 2, 1, 0], [2, 0, 1, -3]]).double()
    with rule:
        compiled(x).sum().backward()
    assert held["lora_topk_bias"].tolist() == [-0.25, 0, 0, 0.25]  # counts 4, 2, 2, 0
    compiled.eval()
    first = compiled(x)
    assert torch.equal(compiled(x), first) and held["lora_topk_bias"].tolist() == [-0.25, 0, 0, 0.25]


def test_ranks_that_no_token_chose_get_no_gradient():
    compiled = hand().train()
    compiled(torch.tensor([[3.0, 2, 1, 0], [3, 1, -1, 0]]).double()).square().sum().backward()
    assert (compiled.adapters["f"].tensors["0"]["lora_B"].grad[0] != 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("detached", [False, True])
def test_detach_router_stops_the_gradient(detached):
    model = host()
    adapter = away(fly(detach_router=detached), model, (X,), "f")
    compiled = lorac.compile(model, {"f": adapter}, aux=["chosen"]).train()
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    held = adapter.tensors["line"]
    through_branch = 9 / 6 * (held["lora_B"].sum(0) * compiled.aux["chosen"]["line"]) @ held["lora_A"]
    assert_close(found, model.line.weight.detach().sum(0) + through_branch * (0 if detached else 1))


@torch.no_grad()
def test_the_size_of_an_input_scales_the_branch_and_chooses_the_same():
    model = host()
    adapter = away(fly(), model, (X,), "f")
    adapter.tensors["line"]["lora_topk_bias"].zero_()
    compiled = lorac.compile(model, {"f": adapter}, aux=["chosen"])
    moved = compiled(X) - model(X)
    chosen = compiled.aux["chosen"]["line"]
    assert_parity(compiled(3 * X), model(3 * X) + 3 * moved, model(3 * X))
    assert torch.equal(compiled.aux["chosen"]["line"], chosen)


def test_dropout_is_on_the_branchs_input_and_in_training_alone():
    model = host()
    adapter = away(fly(dropout=0.5), model, (X,), "f")
    compiled, plain = lorac.compile(model, {"f": adapter}), away(fly(), model, (X,), "f")
    assert torch.equal(compiled(X), lorac.compile(model, {"f": plain})(X))
    compiled.train()
    torch.manual_seed(3)
    torch.randint((1 << 63) - 1, ())  # a call draws a seed first
    dropped = torch.nn.functional.dropout(X, 0.5)
    torch.manual_seed(3)
    found = compiled(X)
    expected = model(X) + lorac.compile(model, {"f": plain})(dropped) - model(dropped)
    assert_close(found, expected)
