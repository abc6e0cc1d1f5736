"""Ways of writing forward that a capture takes as they are, or refuses by layer and line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses
from tests.zoo import ZOO


class _Host(nn.Module):
    """Two layers, whose subclasses call them in different ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5)


class _Branching(_Host):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, self.up, lambda x: self.down(x).tanh(), (x,))


class _Selecting(_Host):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum() > 0, self.up(x), self.down(x).tanh())


class _Nested(_Host):
    def forward(self, x: Tensor) -> Any:
        def inner(x: Tensor) -> Any:
            return torch.cond(x.sum() > 2, lambda x: self.up(x) * 2, self.up, (x,))

        return torch.cond(x.sum() > 0, inner, self.down, (x,))


def _trained(host: nn.Module, x: Tensor) -> lorac.Adapter:
    """Return an adapter of both layers with random tensors."""
    compiled = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=["up", "down"])}, example_inputs=(x,))
    with torch.no_grad():
        for parameter in (p for p in compiled.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return compiled.adapters["a"]


def _compiled(host: nn.Module, inputs: Any, targets: Any = "up", **options: Any) -> Any:
    adapters = {"a": lorac.LoRA(r=2, targets=[targets])}
    return lorac.compile(host, adapters, target="onnxruntime", example_inputs=inputs, **options)


# ── Higher-order ops ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.medium("test_recurrent_layers_in_float64_are_named and the tests of higher-order ops")
def test_layers_in_branches_of_cond_are_adapted() -> None:
    x = torch.rand(3, 6)
    adapter = _trained(_Selecting(), x)
    reference = lorac.compile(_Selecting(), {"a": adapter}, example_inputs=(x,))
    compiled = lorac.compile(_Branching(), {"a": adapter}, target="onnxruntime", example_inputs=(x,))
    for given in (x, -x, x[:2]):
        assert_close(compiled(given), reference(given).detach())
    compiled.swap(None)
    assert_close(compiled(-x), _Branching()(-x).detach())


@pytest.mark.slow("layers in one torch.cond")
def test_branches_inside_branches() -> None:
    compiled = _compiled(_Nested(), (torch.rand(3, 6),), "down")
    for scale in (1.0, 0.01, -1.0):
        given = scale * torch.rand(3, 6)
        assert_close(compiled(given), _Nested()(given).detach())


def test_eager_names_the_line_of_a_branch_that_torch_cannot_compile() -> None:
    compiled = lorac.compile(_Branching(), {"a": lorac.LoRA(r=2, targets=["up"])}, example_inputs=(torch.rand(3, 6),))
    with refuses("unavailable", match=r"(?s)torch\.cond.*host_forms\.py:\d+: return torch\.cond.*torch\.where"):
        compiled(torch.rand(3, 6))


class _Mapped(_Host):
    def forward(self, x: Tensor) -> Any:
        return torch.func.vmap(self.up)(x)


class _Autocast(_Host):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.up(x).float()


class _WithoutAutocast(_Host):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.up(x)


@pytest.mark.parametrize(("host", "around"), [(_Mapped, "vmap"), (_Autocast, "autocast")])
def test_a_context_that_no_program_holds_is_named(host: type[_Host], around: str) -> None:
    with refuses("capture_failed", match=rf"(?s)'up' inside torch's {around}, at .*host_forms\.py:\d+.*outside"):
        _compiled(host(), (torch.rand(3, 6),))


def test_drops_contexts_without_an_effect() -> None:
    x = torch.rand(3, 6)
    assert_close(_compiled(_WithoutAutocast(), (x,))(x), _WithoutAutocast()(x).detach())


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_rejects_script_modules() -> None:
    scripted = torch.jit.trace(_Selecting(), (torch.rand(3, 6),))
    for host, where in ((scripted, "the model is a"), (nn.Sequential(nn.Linear(6, 6), scripted), "'1' is a")):
        with refuses("wrong_type", match=where):
            lorac.sites(host)


# ── Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Keywords(_Host):
    def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
        return self.up(x) * rest["scale"]


def test_keyword_arguments_that_forward_does_not_name_are_inputs() -> None:
    inputs = {"x": torch.rand(3, 6), "scale": torch.rand(3, 1)}
    compiled = _compiled(_Keywords(), inputs)
    more = {"x": torch.rand(4, 6), "scale": torch.rand(4, 1)}
    assert_close(compiled(**more), _Keywords()(**more).detach())


class _Containers(_Host):
    def forward(self, named: Mapping[str, Tensor], listed: list[Tensor]) -> Tensor:
        return self.up(named["x"]) + listed[0]


def test_the_batch_of_tensors_in_dicts_and_lists_varies() -> None:
    def inputs(rows: int) -> dict[str, Any]:
        return {"named": {"x": torch.rand(rows, 6)}, "listed": [torch.rand(rows, 5)]}

    compiled, more = _compiled(_Containers(), inputs(3)), inputs(4)
    assert_close(compiled(**more), _Containers()(**more).detach())


class _Capitals(_Host):
    def forward(self, lS_i: list[Tensor], LS_I: Tensor) -> Tensor:
        return self.up(lS_i[0] - lS_i[1]) * LS_I


class _Keys(_Host):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.up(batch["X"]) - 2 * self.down(batch["x"])


class _Letters(_Host):
    def forward(self, x: Tensor, X: Tensor) -> Tensor:
        return self.up(x) - 2 * self.down(X)


class _Numbered(_Host):
    def forward(self, xs: list[Tensor], xs_0: Tensor) -> Tensor:
        return self.up(xs[0]) - 2 * self.down(xs_0)


@pytest.mark.parametrize("host", [_Capitals, _Keys, _Letters, _Numbered])
def test_inputs_may_differ_by_case_or_place_alone(host: type[_Host], tmp_path: Path) -> None:
    def inputs(rows: int) -> tuple[Any, ...]:
        x, y = torch.rand(2, rows, 6)
        return {
            _Capitals: ([x, y], torch.rand(rows, 1)),
            _Keys: ({"X": x, "x": y},),
            _Letters: (x, y),
            _Numbered: ([x], y),
        }[host]

    compiled, more = _compiled(host(), inputs(3)), inputs(4)
    expected = host()(*more).detach()
    assert_close(compiled(*more), expected)
    compiled.save(tmp_path)
    assert_close(lorac.load(tmp_path)(*more), expected)


def test_dynamic_shapes_reach_into_dicts_and_lists() -> None:
    inputs = {"named": {"x": torch.rand(3, 6)}, "listed": [torch.rand(1, 5)]}
    shapes = {"named": {"x": {0: Dim("rows")}}, "listed": [None]}
    compiled = _compiled(_Containers(), inputs, dynamic_shapes=shapes)
    more = {**inputs, "named": {"x": torch.rand(7, 6)}}
    assert_close(compiled(**more), _Containers()(**more).detach())


class _Scaled(_Host):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.up(x) * scale


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dynamic_shapes_name_a_constant_as_torch_export_demands(scale: float) -> None:
    inputs, more = {"x": torch.rand(3, 6), "scale": scale}, torch.rand(7, 6)
    compiled = _compiled(_Scaled(), inputs, dynamic_shapes={"x": {0: Dim("rows")}, "scale": None})
    assert_close(compiled(x=more, scale=scale), _Scaled()(more, scale).detach())


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_vector_is_no_batch(mode: str) -> None:
    host, x = nn.Sequential(nn.Linear(6, 6)).eval(), torch.rand(6)
    with pytest.warns(lorac.LoracWarning, match="fixed sizes that should vary: axis 0 of 'input', at 6"):
        compiled = _compiled(host, (x,), targets="0", mode=mode)
    assert_close(compiled(x + 1), host(x + 1).detach())


class _Regrouped(nn.Module):
    """Cuts each nine rows into five images, as one of PEFT's test models does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(10, 40), nn.Conv2d(8, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        images = self.conv(self.up(x).reshape(-1, 8, 3, 3)).flatten(1)
        return torch.log_softmax(self.down(images.relu()), dim=-1)


def test_narrows_a_batch_whose_bound_is_a_fraction() -> None:
    host = _Regrouped().eval()
    compiled, more = _compiled(host, (torch.rand(9, 10),)), torch.rand(18, 10)
    assert_close(compiled(more), host(more).detach())


class _Features(nn.Module):
    """A wrapper that is given the tokenizer's dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ZOO["tiny_bert"].fresh()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.inner(**features)[0]


@pytest.mark.medium("test_the_batch_of_tensors_in_dicts_and_lists_varies")
def test_the_length_of_text_in_a_dict_varies() -> None:
    def features(rows: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 20, (rows, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    host = _Features().eval()
    compiled, more = _compiled(host, {"features": features(2, 5)}, "query"), features(3, 8)
    assert_close(compiled(features=more), host(more).detach())


class _Pooling(_Host):
    def forward(self, image: Tensor) -> Tensor:
        return self.up(F.adaptive_avg_pool2d(image, (2, 3)).flatten(1))


@pytest.mark.medium("one pair of shapes", keep=["shapes0"])
@pytest.mark.parametrize("shapes", [{2: Dim("height"), 3: Dim("width", min=3)}, {2: Dim.AUTO, 3: Dim.AUTO}])
def test_adaptive_pools_of_any_size(shapes: dict[int, Any]) -> None:
    compiled = _compiled(_Pooling(), (torch.rand(2, 1, 7, 9),), dynamic_shapes={"image": {0: Dim("batch"), **shapes}})
    for size in ((7, 9), (5, 4), (2, 11)):
        image = torch.rand(3, 1, *size)
        assert_close(compiled(image), _Pooling()(image).detach())


def test_captures_adaptive_pools_of_size_1() -> None:
    image = torch.rand(2, 1, 7, 9)
    assert_close(_compiled(_Pooling(), (image,))(image), _Pooling()(image).detach())


class _Deciding(_Host):
    """A layer inside decides by what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Sign()

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.up(x))


class _Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if int(x.abs().sum()) % 2 else -x


def test_a_trace_that_fails_names_the_layer() -> None:
    with refuses("capture_failed", match=r"host_forms\.py:\d+: return x if .*, in 'inner': "):
        _compiled(_Deciding(), (torch.rand(3, 6),))


class _Pair(_Host):
    """A batch of two halves, as RAFT's encoder has it."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.up(torch.cat([x, x + 1])), x.shape[0])
        return first * second


def test_a_split_by_the_number_of_rows() -> None:
    compiled, x = _compiled(_Pair(), (torch.rand(3, 6),)), torch.rand(4, 6)
    assert_close(compiled(x), _Pair()(x).detach())


# ── Dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class _HalfBody(nn.Module):
    """A body in bfloat16 and a head in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 5).bfloat16(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x.bfloat16())).to(torch.float32))


@pytest.mark.filterwarnings("ignore:onnxruntime has no kernels")
def test_casts_in_forward_follow_a_target_that_lacks_the_dtype() -> None:
    x, host = torch.rand(3, 6), _HalfBody()
    compiled = _compiled(host, (x,))
    wide = host.head(torch.tanh(F.linear(x, host.up.weight.float(), host.up.bias.float())))
    assert_close(compiled(x), wide.detach())
    assert host(x).dtype is torch.float32


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.memory, self.up = kind(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.up(self.memory(x)[0])


@pytest.mark.medium("a GRU", cases=["LSTM"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_in_float64_are_named(kind: type[nn.RNNBase]) -> None:
    with refuses("unavailable", match=f"no kernel for {kind.__name__} in float64, which 'memory' asks for"):
        _compiled(_Recurrent(kind).double(), (torch.rand(4, 2, 6).double(),))


@pytest.mark.medium("ir/graph/test_interpreter.py captures a Llama in float64")
def test_rotary_positions_in_float64() -> None:
    host, ids = ZOO["tiny_llama"].fresh(torch.float64), torch.randint(3, 20, (2, 6))
    compiled = _compiled(host, {"input_ids": ids}, "q_proj")
    assert_close(compiled(input_ids=ids).logits.float(), host(ids).logits.detach().float())


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.medium("test_casts_in_forward_follow_a_target_that_lacks_the_dtype")
@pytest.mark.filterwarnings("ignore:onnxruntime has no kernels")
def test_blocks_are_found_in_the_dtype_of_the_target() -> None:
    x = torch.rand(2, 3, 8).half()
    compiled = lorac.compile(_Blocks().half(), {"a": lorac.AdapterTune(r=2)}, target="onnxruntime", example_inputs=(x,))
    assert set(compiled.adapters["a"].sites) == {"blocks.0", "blocks.1"}


# ── Language models ──────────────────────────────────────────────────────────────────────────────────────────────────
_TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_PAIR = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


@pytest.mark.slow("two other families", cases=["F*"])
@pytest.mark.parametrize(
    ("model", "config", "fields", "code", "named"),
    [
        ("RobertaForCausalLM", "Roberta", {**_TINY, "is_decoder": True}, "unavailable",
         "numbers tokens from the id of padding on"),
        ("FalconForCausalLM", "Falcon", {**_TINY, "alibi": True}, "unavailable", "'transformer' attends by itself"),
        ("SeamlessM4TForTextToText", "SeamlessM4T",
         {**_TINY, **_PAIR, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 4, "t2u_encoder_layers": 1,
          "t2u_decoder_layers": 1, "t2u_vocab_size": 97}, "unavailable", "rules of its own"),
    ],
)  # fmt: skip
def test_rejects_models_without_a_cache_and_names_the_layer(
    model: str, config: str, fields: dict[str, Any], code: str, named: str
) -> None:
    import transformers

    host = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**fields)).eval()
    with refuses(code, match=f"(?s){named}.*cache=False"):
        lorac.compile(host, target="onnxruntime", cache=True)


@torch.no_grad()
def test_robertas_positions_have_no_single_meaning() -> None:
    """transformers' forward numbers tokens from the id of padding on, and its generate from 0, which a model never saw.

    Once these agree, such decoders can decode over a cache.
    """
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(**_TINY, is_decoder=True, initializer_range=0.5)).eval()
    ids = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(ids, use_cache=use, **options).logits[0] for use in (True, False))
    assert torch.equal(cached, uncached)
    assert (cached - model(ids).logits[:, -1]).abs().max() > 0.1 * cached.abs().max()


@torch.no_grad()
def test_falcons_slopes_have_no_single_meaning() -> None:
    """transformers adds them to the scores once by one implementation of attention, and twice by the other.

    Once these agree, Falcon with slopes can decode over a cache as BLOOM does.
    """
    from transformers import FalconConfig, FalconForCausalLM

    answers = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = FalconConfig(**_TINY, alibi=True, multi_query=False, initializer_range=0.2)
        model = FalconForCausalLM._from_config(config, attn_implementation=implementation).eval()
        answers.append(model(torch.arange(3, 12)[None]).logits)
    assert (answers[0] - answers[1]).abs().max() > 1e-2 * answers[0].abs().max()


def test_a_model_of_images_without_features_is_referred_to_the_target_that_generates_from_them() -> None:
    from transformers import GitConfig, GitForCausalLM

    host = GitForCausalLM(GitConfig(**_TINY, vision_config={**_TINY, "image_size": 8, "patch_size": 4})).eval()
    example = {"input_ids": torch.ones(2, 4, dtype=torch.long), "pixel_values": torch.randn(2, 3, 8, 8)}
    with refuses("unavailable", match="'pixel_values'.*\n.*use target='eager'") as error:
        lorac.compile(host, target="onnxruntime", cache=True, example_inputs=example)
    assert "cache=False" not in str(error.value)


@pytest.mark.slow
def test_a_layer_that_mixes_tokens_without_attention_is_named() -> None:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = MiniMaxConfig(**_TINY | {"num_hidden_layers": 2}, num_key_value_heads=2, num_local_experts=2, head_dim=8)
    with refuses("capture_differs", match=r"as 'model\.layers\.\d' may, which has no attention"):
        lorac.compile(MiniMaxForCausalLM(config).eval(), target="onnxruntime", cache=True)
