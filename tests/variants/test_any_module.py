"""Any module is a site or a tap: methods of a few lines at attentions, MLPs and norms, on every target."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers

import lorac
from lorac.ir.slots.program_values import replace_first_tensor
from lorac.testing import assert_close
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.modules import Bottleneck, Experts, Routed, SideNetwork

IDS, OTHER = torch.randint(0, 61, (2, 7)), torch.randint(0, 61, (3, 11))
METHODS = {"bottleneck": Bottleneck(), "side": SideNetwork(), "experts": Experts(), "routed": Routed()}
SHARES = {"bottleneck": 0.3, "side": 0.2, "experts": 0.1, "routed": 0.3}
"""Strengths at which they move the output by a share that the measure admits."""


@functools.cache
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


@functools.cache
def adapters() -> dict[str, lorac.Adapter]:
    return {name: lorac.compile(llama(), {name: method}).adapters[name] for name, method in METHODS.items()}


@functools.cache
def emitted() -> lorac.session.compiled.Compiled:
    return lorac.compile(llama(), adapters(), target="onnxruntime", aux=["gates", "router"])


def exact(adapter: lorac.Adapter) -> lorac.Adapter:
    wide = {id(t): t.detach().double() for t in adapter.parameters()}
    tensors = {path: {name: wide[id(t)] for name, t in at.items()} for path, at in adapter.tensors.items()}
    return lorac.Adapter(adapter.name, adapter.variant, tensors)


# ── By hand: hooks on the model itself ───────────────────────────────────────────────────────────────────────────────
def by_hand(name: str, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits with a method at its strength, in float64."""
    host, seen, t = copy.deepcopy(llama()).double(), {}, SHARES[name]

    def noted(key, module, args, kwargs, output):
        seen[key] = output[0] if isinstance(output, tuple) else output
        seen[f"in:{key}"] = args[0] if args else kwargs.get("hidden_states")

    for path, module in host.named_modules():
        module.register_forward_hook(functools.partial(noted, path), with_kwargs=True)
    if name == "routed":
        host(input_ids=ids)
        seen["gates"] = (seen["model.norm"] @ next(iter(held(name).values()))["classifier"].T).softmax(-1)
    for path, p in held(name).items():

        def hook(module, args, kwargs, output, path=path, p=p):
            x = args[0] if args else kwargs["hidden_states"]
            return replace_first_tensor(output, lambda y: y + t * (BY_HAND[name](host, path, x, y, p, seen) - y))

        host.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    return host(input_ids=ids).logits


def held(name: str) -> dict[str, dict[str, torch.Tensor]]:
    return exact(adapters()[name]).tensors


def _experts(host, path, x, y, p, seen):
    mlp = host.get_submodule(path)
    logits = x @ p["gate"].T
    out = logits.softmax(-1)
    chosen = torch.zeros_like(out).scatter(-1, logits.topk(2).indices, 1)
    shares = out * chosen / (out * chosen).sum(-1, keepdim=True)
    total = shares[..., :1] * y
    for e in range(2):  # every expert merged
        g, u, d = (
            getattr(mlp, f"{long}_proj").weight + p[f"{part}_B{e}"] @ p[f"{part}_A{e}"]
            for part, long in (("g", "gate"), ("u", "up"), ("d", "down"))
        )
        total = total + shares[..., e + 1 : e + 2] * ((F.silu(x @ g.T) * (x @ u.T)) @ d.T)
    return total


def _side(host, path, x, y, p, seen):
    return y + sum(seen[tap].tanh() @ p[f"up{i}"].T for i, tap in enumerate(SideNetwork().taps))


BY_HAND = {
    "bottleneck": lambda host, path, x, y, p, seen: y + F.silu(y @ p["down"].T) @ p["up"].T,
    "side": _side,
    "experts": _experts,
    "routed": lambda host, path, x, y, p, seen: y + (x @ p["lora_A"].T * seen["gates"]) @ p["lora_B"].T,
}


@pytest.mark.medium("the kit's hosts, and test_a_vit there")
@pytest.mark.slow("the same methods at another batch and length", cases=["as captured-*"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ids", [IDS, OTHER], ids=["as captured", "another batch and length"])
@torch.no_grad()
def test_methods_of_whole_modules_match_the_equations(name: str, ids: torch.Tensor) -> None:
    y, choice = by_hand(name, ids), {name: SHARES[name]}
    host = copy.deepcopy(llama()).double()
    assert_parity(
        lorac.compile(host, {name: exact(adapters()[name])})(input_ids=ids, adapters=choice).logits,
        y,
        host(input_ids=ids).logits,
    )
    off = emitted()(input_ids=ids, adapters=None).logits
    assert_parity(
        emitted()(input_ids=ids, adapters=choice).logits, y.float(), llama()(input_ids=ids).logits, own_base=off
    )


@pytest.mark.medium(
    "test_a_vit emits modules, runtime/test_rows_branches.py has rows and test_x_lora.py a router's outputs"
)
@torch.no_grad()
def test_rows_choose_and_extra_outputs_are_joined() -> None:
    choices = ["routed", None, "experts"]
    rows = emitted()(input_ids=OTHER, adapters=choices).logits
    aux = emitted().aux
    for i, choice in enumerate(choices):
        alone = emitted()(input_ids=OTHER[i : i + 1], adapters=choice).logits
        assert_close(rows[i : i + 1], alone)
    assert {name: len(found) for name, found in aux.items()} == {"gates": 4, "router": 2}
    given = {name: found for name, found in aux.items() for found in found.values()}
    assert [torch.isnan(given["gates"][i]).all().item() for i in range(3)] == [False, True, True]
    assert [torch.isnan(given["router"][i]).all().item() for i in range(3)] == [True, True, False]


@pytest.mark.slow
@torch.no_grad()
def test_artifacts_keep_modules_and_shared_values(tmp_path) -> None:
    for target, compiled in {"eager": lorac.compile(llama(), adapters()), "onnxruntime": emitted()}.items():
        compiled.save(tmp_path / target)
        again = lorac.load(tmp_path / target)
        for name in METHODS:
            y = compiled(input_ids=OTHER, adapters=name).logits
            assert_close(again(input_ids=OTHER, adapters=name).logits, y)
        again.remove_adapter("side")
        again.save(tmp_path / "less")
        assert "model.norm" in lorac.load(tmp_path / "less").plans


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_merging_without_a_weight_form(mode: str) -> None:
    with refuses("not_mergeable", match="no weight form"):
        lorac.compile(llama(), {"b": adapters()["bottleneck"]}, mode=mode)


@torch.no_grad()
def test_a_vit() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    host = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    eager = lorac.compile(host, {"b": Bottleneck(targets=["attention", "mlp"])})
    pixels = torch.randn(3, 3, 8, 8)
    y, base = eager(pixel_values=pixels).last_hidden_state, host(pixel_values=pixels).last_hidden_state
    paths = [f"layers.{i}.{module}" for i in range(2) for module in ("attention", "mlp")]
    assert sorted(eager.adapters["b"].sites) == paths
    emitted = lorac.compile(host, {"b": eager.adapters["b"]}, target="onnxruntime")
    assert_parity(emitted(pixel_values=pixels).last_hidden_state, y, base)
