"""FlexMoRE: its paper's equations, FlexOlmo built from merged experts, and every target."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers

import lorac
from lorac.testing import assert_close
from tests.oracles import flexmore as oracle
from tests.parity import assert_parity
from tests.refusing import refuses

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.15,
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
IDS, OTHER = (torch.arange(7 * rows, 7 * rows + rows * long).view(rows, long) % 61 for rows, long in ((2, 7), (3, 11)))
RANKS = (3, 0, 16)
"""Of low rank, full, and of as many as the smaller side has: nothing is left out there."""
MLPS = ("model.layers.0.mlp", "model.layers.1.mlp")


@functools.cache
def public() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES)).eval()


@functools.cache
def experts() -> tuple[torch.nn.Module, ...]:
    """The public model three times, its MLPs trained on something else."""
    generator = torch.Generator().manual_seed(1)
    made = tuple(copy.deepcopy(public()) for _ in RANKS)
    for model in made:
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    return made


@functools.cache
def routers() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {path: torch.randn(1 + len(RANKS), 16, generator=generator) for path in MLPS}


@functools.cache
def mixture(*ranks: int, normalise: bool = False) -> lorac.Adapter:
    return lorac.FlexMoRE.from_experts(public(), experts(), routers(), ranks=ranks, normalise=normalise, name="mix")


def exact(adapter: lorac.Adapter) -> lorac.Adapter:
    tensors = {path: {name: t.double() for name, t in at.items()} for path, at in adapter.tensors.items()}
    return lorac.Adapter(adapter.name, adapter.variant, tensors)


def merged(adapter: lorac.Adapter) -> torch.nn.Module:
    """transformers' FlexOlmo, every expert merged and packed as it packs them."""
    config = transformers.FlexOlmoConfig(
        **SIZES,
        num_experts=1 + len(RANKS),
        num_experts_per_tok=adapter.variant.top_k,
        norm_topk_prob=adapter.variant.normalise,
        rms_norm_eps=public().config.rms_norm_eps,
        rope_parameters=public().config.rope_parameters,
        _experts_implementation="eager",
    )
    model = transformers.FlexOlmoForCausalLM(config).double().eval()
    state = {name: t.double() for name, t in public().state_dict().items() if ".mlp." not in name}
    for path, at in adapter.tensors.items():
        mlp, p = public().get_submodule(path), SimpleNamespace(**{n: t.double().numpy() for n, t in at.items()})
        base = [getattr(mlp, f"{part}_proj").weight.detach().double().numpy() for part in ("gate", "up", "down")]
        whole = [base, *(oracle.matrices(base, p, n, rank) for n, rank in enumerate(adapter.variant.ranks, 1))]
        packed = [[torch.as_tensor(w) for w in parts] for parts in whole]
        state[f"{path}.experts.gate_up_proj"] = torch.stack([torch.cat(parts[:2]) for parts in packed])
        state[f"{path}.experts.down_proj"] = torch.stack([parts[2] for parts in packed])
        state[f"{path}.gate.weight"] = at["router"].double()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("normalise", [False, True])
@torch.no_grad()
def test_matches_flexolmo_built_from_merged_experts(normalise):
    adapter = mixture(*RANKS, normalise=normalise)
    theirs = merged(adapter).float()  # its router computes its softmax in float32, whatever the model is in
    y = lorac.compile(public(), {"mix": adapter})(input_ids=OTHER).logits
    assert_parity(y, theirs(input_ids=OTHER).logits, public()(input_ids=OTHER).logits)


@torch.no_grad()
def test_an_mlp_matches_the_equations():
    adapter = exact(mixture(*RANKS))
    mlp = copy.deepcopy(public().get_submodule(MLPS[0])).double()
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    layers = {n: getattr(mlp, n) for n in ("gate_proj", "up_proj", "down_proj")}
    values = {f"{MLPS[0]}.{n}": layers[n](x) for n in ("gate_proj", "up_proj")}
    values[f"weight:{MLPS[0]}.down_proj"] = layers["down_proj"].weight
    emitted: list[torch.Tensor] = []
    ctx = SimpleNamespace(site=SimpleNamespace(path=MLPS[0]), value=values.get, emit=lambda _, t: emitted.append(t))
    tensors = adapter.tensors[MLPS[0]]
    y = adapter.variant.branch(x, mlp(x), SimpleNamespace(**tensors), ctx)
    p = SimpleNamespace(**{name: t.numpy() for name, t in tensors.items()})
    base = [layer.weight.numpy() for layer in layers.values()]
    assert_parity(y, torch.from_numpy(oracle.mlp(x.numpy(), base, p, adapter.variant)), mlp(x))
    chosen = oracle.shares(emitted[0].numpy(), 2, normalise=False) > 0
    assert chosen.reshape(-1, 4).any(0).all()  # every expert has tokens, the model's own too


@pytest.mark.slow("test_any_module.py runs experts there")
@torch.no_grad()
def test_onnx_runtime_equals_eager_at_another_batch_and_length_and_swaps_experts_without_a_build():
    first, second = mixture(*RANKS), copy.deepcopy(mixture(*RANKS))
    second.name = "other"
    for at in second.tensors.values():
        at |= {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in at.items()}
    eager = lorac.compile(public(), [first, second], active=None)
    emitted = lorac.compile(public(), [first, second], target="onnxruntime", active=None, aux=["router"])
    base, off = public()(input_ids=OTHER).logits, emitted(input_ids=OTHER).logits
    for choice in ("mix", "other", {"mix": 0.6}):
        emitted.swap(choice)
        y = emitted(input_ids=OTHER).logits
        assert_parity(y, eager(input_ids=OTHER, adapters=choice).logits, base, own_base=off)
        assert emitted.aux["router"][MLPS[0]].shape == (3, 11, 4)


def test_the_truncation_error_equals_the_tail_of_singular_values():
    own = experts()[0].get_submodule(MLPS[0]).up_proj.weight.detach().double()
    base = public().get_submodule(MLPS[0]).up_proj.weight.detach().double()
    at = mixture(5, 0, 40).tensors[MLPS[0]]
    left = own - base - at["up_1_B"].double() @ at["up_1_A"].double()
    values = torch.linalg.svdvals(own - base)
    assert_close(left.square().sum(), values[5:].square().sum())
    assert not at["up_3_A"][16:].any()  # a rank above the smaller side is filled with zeros
    assert oracle.erank([1, 1, 1, 1]) == 4 and oracle.erank([8, 1, 1]) == 2


@torch.no_grad()
def test_experts_change_places_with_their_routers_rows():
    adapter = exact(mixture(*RANKS))
    order, variant = (2, 0, 1), lorac.FlexMoRE(**{**adapter.variant.settings, "ranks": (16, 3, 0)})
    moved = {}
    for path, at in adapter.tensors.items():
        moved[path] = {"router": at["router"][[0, *(old + 1 for old in order)]]}
        for new, old in enumerate(order, 1):
            named = {n: t for n, t in at.items() if n.split("_")[1:2] == [str(old + 1)]}
            moved[path] |= {n.replace(f"_{old + 1}", f"_{new}", 1): t for n, t in named.items()}
    host = copy.deepcopy(public()).double()
    compiled = lorac.compile(host, {"a": adapter, "b": lorac.Adapter("b", variant, moved)}, active=None)
    first, second = (compiled(input_ids=IDS, adapters=name).logits for name in "ab")
    assert_parity(second, first, host(input_ids=IDS).logits)


def alone(number: int, rank: int = 0) -> lorac.Adapter:
    """The mixture of the public model and one of the experts, as its owner trains it, with the public row drawn too."""
    rows = {path: router[[0, number]] + number for path, router in routers().items()}
    return lorac.FlexMoRE.from_experts(public(), [experts()[number - 1]], rows, ranks=(rank,), name=f"own{number}")


@torch.no_grad()
def test_mixtures_that_were_trained_apart_are_joined_at_other_ranks():
    joined = lorac.FlexMoRE.join([alone(1), alone(2), alone(3, 16)], model=public(), ranks=RANKS, name="mix")
    rows = {path: router - router[:1] for path, router in routers().items()}
    expected = lorac.FlexMoRE.from_experts(public(), experts(), rows, ranks=RANKS, name="mix")
    assert joined.variant == expected.variant
    first, second = (lorac.compile(public(), {"mix": mix})(input_ids=IDS).logits for mix in (joined, expected))
    assert_parity(first, second, public()(input_ids=IDS).logits)
    wide = lorac.FlexMoRE.join([alone(3, 16)], model=public(), ranks=[0]).tensors[MLPS[0]]["up_1"]
    assert_close(wide, experts()[2].get_submodule(MLPS[0]).up_proj.weight.detach())


@torch.no_grad()
def test_a_mixture_that_is_joined_alone_stays():
    one = alone(2, 3)
    compiled = lorac.compile(public(), {"a": one, "b": lorac.FlexMoRE.join([one], name="b")}, active=None)
    first, second = (compiled(input_ids=IDS, adapters=name).logits for name in "ab")
    assert_parity(second, first, public()(input_ids=IDS).logits)


def test_rejects_joining_other_adapters():
    join = lorac.FlexMoRE.join
    for wrong in ([], [lorac.compile(public(), {"a": lorac.LoRA(r=1)}).adapters["a"]]):
        with pytest.raises(lorac.AdapterNotFound, match="not a FlexMoRE"):
            join(wrong)
    with pytest.raises(lorac.BaseNeeded):
        join([alone(1)], ranks=[2])
    with pytest.raises(lorac.AdapterError, match="2 ranks for 1 experts"):
        join([alone(1)], ranks=[2, 2], model=public())
    fewer = {path: router[:2] for path, router in routers().items() if path == MLPS[0]}
    with refuses("shape_mismatch", match="'less' adapts other MLPs than 'own1'"):
        join([alone(1), lorac.FlexMoRE.from_experts(public(), [experts()[0]], fewer, ranks=[0], name="less")])
    wider = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{**SIZES, "intermediate_size": 32}))
    for one in (alone(1), alone(1, 4)):
        with refuses("shape_mismatch", match="in the public model"):
            join([one], ranks=[2], model=wider)


def test_trains_and_leaves_the_model_unchanged():
    model = copy.deepcopy(public())
    compiled = lorac.compile(model, {"a": lorac.FlexMoRE(ranks=(2, 0), top_k=3)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = [tensor.detach().clone() for tensor in compiled.adapters["a"].parameters()]
    optimizer = torch.optim.AdamW(compiled.adapters["a"].parameters(), lr=1e-2, weight_decay=0.1)
    compiled.train()
    for _ in range(2):
        optimizer.zero_grad()
        compiled(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(map(torch.equal, compiled.adapters["a"].parameters(), start))


@torch.no_grad()
def test_saves_and_runs_in_half_precision(tmp_path):
    lorac.save_adapter(mixture(*RANKS), tmp_path / "a", format="native", model=public())
    again = lorac.load_adapter(tmp_path / "a", public())
    reference = lorac.compile(public(), {"a": mixture(*RANKS)})(input_ids=IDS).logits
    assert torch.equal(lorac.compile(public(), {"a": again})(input_ids=IDS).logits, reference)
    half = lorac.compile(copy.deepcopy(public()).half(), {"a": again})(input_ids=IDS).logits
    assert half.dtype is torch.float16 and torch.isfinite(half).all()


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_fusing_and_baking(mode):
    with refuses("not_mergeable"):
        lorac.compile(public(), {"a": mixture(*RANKS)}, mode=mode, active="a")


def test_rejects_models_and_files_that_do_not_fit():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2))
    with refuses("site_unsupported", match="act\\(gate\\) times up"):
        lorac.compile(gpt2, {"a": lorac.FlexMoRE(ranks=(2,))})
    with pytest.raises(lorac.AdapterError, match="ranks"):
        lorac.compile(public(), {"a": lorac.FlexMoRE(ranks=())})
    with refuses("shape_mismatch", match="in an expert"):
        wider = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{**SIZES, "intermediate_size": 32}))
        lorac.FlexMoRE.from_experts(public(), [wider], routers(), ranks=[2])
