"""MeteoRA: the oracles of its paper, and models under a router, in eager and in ONNX Runtime."""

import copy
import dataclasses
import math

import pytest
import torch

import lorac
from lorac import Site, SiteKind
from lorac.testing import assert_close
from lorac.variants._mixtures import top_k_mask, top_k_softmax
from tests.emitted import read_emitted
from tests.oracles import meteora as oracle
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.away import drawn, scaled
from tests.variants.routers import X, host, loras
from tests.zoo import ZOO

GAP = 1e-4
"""Tokens whose k-th and (k+1)-th logits are nearer than this may be routed either way by rounding."""


def with_gates(adapter, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensors in adapter.tensors.values():
        gate = tensors["moe_gate"]
        gate.copy_(scale * torch.randn(gate.shape, generator=generator))
    return adapter


def run(model, adapter, x):
    with torch.no_grad():
        return lorac.compile(model, {"task": adapter})(x)


def test_zero_b_is_the_base():
    model = host()
    adapter = with_gates(lorac.MeteoRA.from_loras(loras(model, (X,))))
    adapter.tensors["line"]["lora_B"].zero_()
    assert torch.equal(run(model, adapter, X), model(X))


@pytest.mark.parametrize("k", [1, 2])
def test_a_single_expert_equals_its_lora(k):
    model = host()
    (lora,) = loras(model, (X,), (3,))
    adapter = with_gates(lorac.MeteoRA.from_loras([lora], top_k=k))
    assert_parity(run(model, adapter, X), run(model, lora, X), model(X).detach())


@pytest.mark.parametrize("k", [1, 2])
def test_a_huge_logit_is_that_lora(k):
    model = host()
    x = X.abs()
    experts = loras(model, (x,))
    adapter = lorac.MeteoRA.from_loras(experts, top_k=k)
    adapter.tensors["line"]["moe_gate"].zero_()[2] = 1e6
    assert_parity(run(model, adapter, x), run(model, experts[2], x), model(x).detach())


@pytest.mark.medium("two of several", keep=["2"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_loop_gathered_and_dense_agree(k):
    """The oracle loops over tokens and experts; here the gathered form; the variant is the dense one."""
    model = host()
    adapter = with_gates(lorac.MeteoRA.from_loras(loras(model, (X,)), top_k=k, temperature=3.0))
    p, variant, base = adapter.tensors["line"], adapter.variant, model(X).detach()
    values, index = torch.topk(X @ p["moe_gate"].T, k)
    a = p["lora_A"].unflatten(0, (4, variant.r))[index]
    b = p["lora_B"].unflatten(1, (4, variant.r)).transpose(0, 1)[index]
    each = torch.einsum("...kor,...kri,...i->...ko", b, a, X)
    gathered = base + ((values / 3).softmax(-1).unsqueeze(-1) * each).sum(-2)
    y = run(model, adapter, X)
    assert_parity(y, gathered, base)
    arrays = type("P", (), {name: tensor.numpy() for name, tensor in p.items()})
    assert_parity(y, torch.from_numpy(oracle.branch(X.numpy(), base.numpy(), arrays, variant)), base)


def test_the_union_of_sites_ranks_and_scales_is_exact():
    model = ZOO["tiny_llama"].fresh(torch.float64)
    inputs = ZOO["tiny_llama"].inputs()
    first = loras(model, inputs, (2,), ("q_proj", "down_proj"))[0]
    second = loras(model, inputs, (3,), ("q_proj",))[0]
    adapter = lorac.MeteoRA.from_loras([first, second], top_k=1)
    assert set(adapter.sites) == {*first.sites, *second.sites}
    assert adapter.variant.r == 3
    assert not adapter.tensors["model.layers.0.mlp.down_proj"]["lora_B"][:, 3:].any()
    base = model(**inputs)
    for tensors in adapter.tensors.values():
        tensors["moe_gate"].zero_()  # equal logits: the first
    compiled = lorac.compile(model, {"task": adapter, "first": first})
    reference = compiled(**inputs, adapters="first")
    assert_parity(compiled(**inputs, adapters="task"), reference, base, names=["logits"])


@pytest.mark.medium("two of three", keep=["2"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_ranks_padded_with_zeros_change_nothing(k):
    """Three experts of rank 2 in room for 5, under gates that choose by token."""
    model = host()
    narrow = with_gates(lorac.MeteoRA.from_loras(loras(model, (X,), (2, 2, 2)), top_k=k))
    p = narrow.tensors["line"]
    pad = torch.nn.functional.pad
    padded = {
        "lora_A": pad(p["lora_A"].unflatten(0, (3, 2)), (0, 0, 0, 3)).flatten(0, 1),
        "lora_B": pad(p["lora_B"].unflatten(1, (3, 2)), (0, 3)).flatten(1),
        "moe_gate": p["moe_gate"],
    }
    assert padded["lora_A"].shape == (15, 7)
    wide = lorac.Adapter("task", dataclasses.replace(narrow.variant, r=5, alpha=5), {"line": padded})
    assert len((X @ p["moe_gate"].T).argmax(-1).unique()) == 3
    assert_close(run(model, wide, X), run(model, narrow, X))


@pytest.mark.parametrize("change", ["dora", "bias", "saved", "shape", "none"])
def test_rejects_experts_that_are_not_plain_loras(change):
    model = ZOO["plain_mlp"].model()
    fresh = {
        "dora": lorac.DoRA(r=2, targets=["up"]),
        "bias": lorac.LoRA(r=2, targets=["up"], lora_bias=True),
        "saved": lorac.LoRA(r=2, targets=["up"], modules_to_save=["head"]),
    }
    lora = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["up"])}).adapters["a"]
    if change == "shape":
        other = copy.deepcopy(lora)
        other.tensors["up"]["lora_B"] = torch.zeros(9, 2)
    given = [] if change == "none" else [lora]
    if change in fresh:
        given.append(lorac.compile(model, {"b": fresh[change]}).adapters["b"])
    elif change == "shape":
        given.append(other)
    with pytest.raises(lorac.AdapterError):
        lorac.MeteoRA.from_loras(given)


def test_the_papers_parameter_counts():
    site = Site("q_proj", SiteKind.LINEAR, 50, 70, torch.float32, None)
    specs = lorac.MeteoRA(r=8, experts=28).params(site)
    sizes = {name: torch.Size(spec.shape).numel() for name, spec in specs.items()}
    assert sum(sizes.values()) == 28 * 70 + 28 * 8 * (70 + 50)
    assert {name for name, spec in specs.items() if spec.role == "trainable"} == {"moe_gate"}
    both = lorac.MeteoRA(experts=28, train_experts=True).params(site)
    assert all(spec.role == "trainable" for spec in both.values())


@pytest.mark.medium("trainer/test_steps.py moves the gates")
def test_the_gate_loss_at_zero_gates_is_ln_l_and_trains_the_gates_alone():
    model = host()
    adapter = lorac.MeteoRA.from_loras(loras(model, (X,), (1,) * 28))
    adapter.tensors["line"]["moe_gate"].zero_()
    compiled = lorac.compile(model, {"task": adapter}, aux=("router",))
    compiled(X)
    logits = compiled.aux["router"]["line"].flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), 17))
    assert_close(loss.detach(), torch.tensor(math.log(28), dtype=torch.float64))
    loss.backward()
    trained = compiled.adapters["task"].tensors["line"]
    assert trained["moe_gate"].grad.any()
    assert not trained["lora_A"].requires_grad and not trained["lora_B"].requires_grad


def test_the_output_trains_the_gates():
    model = host()
    compiled = lorac.compile(model, {"task": with_gates(lorac.MeteoRA.from_loras(loras(model, (X,))))})
    compiled(X).square().sum().backward()
    assert compiled.adapters["task"].tensors["line"]["moe_gate"].grad.any()


@torch.no_grad()
def test_dropout_is_on_each_experts_input_in_training_and_the_gates_see_all():
    model = host()
    experts = loras(model, (X,))
    adapter = with_gates(lorac.MeteoRA.from_loras(experts, dropout=0.5))
    compiled = lorac.compile(model, {"task": adapter}, aux=("router",))
    plain = with_gates(lorac.MeteoRA.from_loras(experts))
    assert torch.equal(compiled(X), run(model, plain, X))
    compiled.train()
    torch.manual_seed(3)
    torch.randint((1 << 63) - 1, ())  # the seed of the call
    dropped = [torch.nn.functional.dropout(X, 0.5) for _ in experts]
    torch.manual_seed(3)
    found = compiled(X)
    p = adapter.tensors["line"]
    assert_close(compiled.aux["router"]["line"], X @ p["moe_gate"].T)
    weights = top_k_softmax(X @ p["moe_gate"].T, 2).repeat_interleave(adapter.variant.r, -1)
    hidden = torch.cat([x @ a.T for x, a in zip(dropped, p["lora_A"].chunk(4), strict=True)], -1)
    assert_close(found, model(X) + (hidden * weights) @ p["lora_B"].T)


def _authors(x, p, variant, rate):
    """Return what ``moelinear_fwd_inner_bmm_torch`` of NJUDeepEngine/meteora adds: it drops every pair's own input."""
    logits, chosen = torch.topk(x @ p["moe_gate"].T, variant.top_k)
    a, b = p["lora_A"].unflatten(0, (variant.experts, -1)), p["lora_B"].unflatten(1, (variant.experts, -1))
    pairs = chosen.flatten()
    tokens = x[:, None].expand(-1, variant.top_k, -1).reshape(len(pairs), 1, -1)
    dropped = torch.nn.functional.dropout(tokens, rate)
    each = torch.bmm(torch.bmm(dropped, a[pairs].mT), b.permute(1, 2, 0)[pairs]).squeeze(1)
    return (each * logits.softmax(-1).view(-1, 1)).view(len(x), variant.top_k, -1).sum(1)


@torch.no_grad()
def test_dropout_varies_as_much_as_the_authors():
    """Of one token, over 40 000 draws: a mask for all experts together would vary twice as much."""
    model, x = host(), X.reshape(-1, X.shape[-1])[:1].expand(40_000, -1)
    one = loras(model, (X,))[0]
    adapter = with_gates(lorac.MeteoRA.from_loras([one, one], dropout=0.1))
    compiled = lorac.compile(model, {"task": adapter}).train()
    torch.manual_seed(0)
    found = compiled(x).var(0).sum()
    expected = _authors(x, adapter.tensors["line"], adapter.variant, 0.1).var(0).sum()
    assert abs(found / expected - 1) < 0.05


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_a_router_has_no_weight_form(mode):
    model = host()
    with refuses("not_mergeable"):
        lorac.compile(model, {"task": lorac.MeteoRA.from_loras(loras(model, (X,)))}, mode=mode)


def test_rejects_unknown_extra_outputs():
    with pytest.raises(lorac.OptionError, match="router"):
        lorac.compile(host(), {"task": lorac.MeteoRA(targets=["line"])}, aux=("routers",))


@torch.no_grad()
def test_a_router_and_a_lora_add_up_each_against_the_bases_output():
    model = host()
    experts = loras(model, (X,))
    router = with_gates(lorac.MeteoRA.from_loras(experts[:2], top_k=1))
    compiled = lorac.compile(model, {"task": router, "l": experts[2]})
    base, one, two = model(X), compiled(X, adapters="task"), compiled(X, adapters="l")
    mixed = compiled(X, adapters={"task": 0.8, "l": 0.5})
    assert_parity(mixed, base + 0.8 * (one - base) + 0.5 * (two - base), base)


@pytest.mark.medium("extra outputs of backends/eager/test_rows.py")
@torch.no_grad()
def test_two_active_routers_give_their_logits_side_by_side():
    model = host()
    experts = loras(model, (X,))
    given = {name: with_gates(lorac.MeteoRA.from_loras(experts[:2]), seed=i) for i, name in enumerate("ab")}
    logits = {name: X @ adapter.tensors["line"]["moe_gate"].T for name, adapter in given.items()}
    for target in ("eager", "onnxruntime"):
        dtype = torch.float64 if target == "eager" else torch.float32
        compiled = lorac.compile(
            model, given, target=target, aux=("router",), dtype=dtype, example_inputs=(X.to(dtype),)
        )
        compiled.swap({"b": 0.5, "a": 0.5})
        compiled(X.to(dtype))
        assert_close(compiled.aux["router"]["line"], logits["a"].to(dtype))
        assert_close(compiled.aux["router"]["line[1]"], logits["b"].to(dtype))
        compiled.swap("b")
        compiled(X.to(dtype))
        assert compiled.aux["router"].keys() == {"line"}
        assert_close(compiled.aux["router"]["line"], logits["b"].to(dtype))


def routed(entry, scale, targets=None, seed=0):
    model, targets = entry.model(), targets or entry.targets
    fresh = [lorac.LoRA(r=r, alpha=3 * r + i, targets=targets) for i, r in enumerate((2, 3, 1, 2))]
    experts = [drawn(lora, model, f"l{seed}{i}") for i, lora in enumerate(fresh)]
    return scaled(with_gates(lorac.MeteoRA.from_loras(experts), scale, seed), model, entry.inputs(batch=2, length=8))


def gaps(logits, k=2):
    """How far every token's k-th logit is above the next."""
    ordered = logits.sort(-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k]


def check_routed(entry, scale, length):
    """ONNX Runtime equals eager, every expert chosen by a tenth of the tokens, at most 1 % of choices on the edge.

    Should rounding decide one of these otherwise, what follows that token is not compared.
    """
    model, adapter = entry.model(), routed(entry, scale)
    inputs = {name: value[:2] for name, value in entry.inputs(batch=3, length=length).items()}  # no padding
    eager = lorac.compile(model, {"task": adapter}, aux=("router",))
    emitted = lorac.compile(model, {"task": adapter}, target="onnxruntime", aux=("router",))
    with torch.no_grad():
        base, reference = model(**inputs).logits, eager(**inputs).logits
    found = emitted(**inputs).logits
    paths = list(eager.aux["router"])
    chosen = torch.stack([top_k_mask(eager.aux["router"][path], 2) for path in paths])
    close = torch.stack([gaps(eager.aux["router"][path]) < GAP for path in paths])
    differs = torch.stack([top_k_mask(emitted.aux["router"][path], 2) for path in paths]).ne(chosen).any(-1)
    shares = chosen.flatten(0, -2).float().mean(0)
    print(f"shares {shares.tolist()}, {int(close.sum())} of {close.numel()} choices near a tie")
    assert (shares >= 0.1).all() and close.float().mean() <= 0.01
    alike = close.any(0).long().cumsum(-1) == 0 if differs.any() else torch.ones_like(close[0])
    assert not differs[:, alike].any() and alike.any()
    own = emitted(**inputs, adapters=None).logits
    assert_parity(*(output[alike] for output in (found, reference, base)), own_base=own[alike])


@pytest.mark.slow("the kit's MeteoRA there")
def test_a_llama_with_four_loras_is_the_same_in_onnx_runtime():
    check_routed(ZOO["tiny_llama"], 0.3, 6)


@pytest.mark.slow
def test_smollm2_with_four_loras_is_the_same_in_onnx_runtime():
    check_routed(ZOO["smollm2"], 0.05, 32)


@pytest.mark.slow("test_routed.py exchanges routers and experts there")
@torch.no_grad()
def test_onnx_runtime_swaps_routers_of_equal_structure():
    entry = ZOO["plain_mlp"]
    model, inputs = entry.model(), entry.inputs()
    first, second = (routed(entry, 0.3, ("up", "down"), seed) for seed in (1, 2))
    eager = lorac.compile(model, {"a": first, "b": second})
    emitted = lorac.compile(model, {"a": first}, target="onnxruntime", example_inputs=inputs)
    base, own = model(**inputs), emitted(**inputs, adapters=None)
    before = emitted(**inputs)
    emitted.add_adapter(second, "b")
    for choice in ("b", {"b": 0.6}, "a"):
        emitted.swap(choice)
        reference = eager(**inputs, adapters=choice)
        assert_parity(emitted(**inputs), reference, base, own_base=own)
    assert torch.equal(emitted(**inputs), before)
    emitted.swap(None)
    assert torch.equal(emitted(**inputs), own)
    with pytest.raises(lorac.NeedsRecompile):
        emitted.swap({"a": 0.5, "b": 0.5})
    three = lorac.MeteoRA.from_loras(loras(model, inputs, (2, 3, 1), ("up", "down")))
    with pytest.raises(lorac.NeedsRecompile):
        emitted.add_adapter(three, "c")


@pytest.mark.medium("test_routing.py's ties")
@torch.no_grad()
def test_zero_gates_choose_the_first_two_everywhere():
    entry = ZOO["plain_mlp"]
    model, inputs = entry.model(), entry.inputs()
    adapter = routed(entry, 0.0, ("up", "down"))
    experts = copy.deepcopy(adapter)
    for tensors in experts.tensors.values():
        tensors["lora_B"][:, 2 * adapter.variant.r :] = 0  # the two that no token goes to
    base = model(**inputs)
    reference = lorac.compile(model, {"task": experts})(**inputs)
    for target in ("eager", "onnxruntime"):
        compiled = lorac.compile(model, {"task": adapter}, target=target, example_inputs=inputs)
        assert_parity(compiled(**inputs), reference, base, own_base=compiled(**inputs, adapters=None))


def test_emits_the_added_term_without_a_difference() -> None:
    """y' − y of y' = y + m is m: two ops less that are as long as y."""
    model, x = host().float(), X.float()
    adapter = with_gates(lorac.MeteoRA.from_loras(loras(host(), (X,))))
    tensors = {path: {key: t.float() for key, t in own.items()} for path, own in adapter.tensors.items()}
    single = lorac.Adapter("task", adapter.variant, tensors)
    compiled = lorac.compile(model, {"task": single}, target="onnxruntime", example_inputs=(x,))
    (gate,) = (n for n in read_emitted(compiled)[0].graph.node if n.op_type == "If")
    assert not [n for branch in gate.attribute for n in branch.g.node if n.op_type == "Sub"]
    with torch.no_grad():
        assert_parity(compiled(x), lorac.compile(model, {"task": single})(x), model(x))
