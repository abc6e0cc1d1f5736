"""The program equals the model (invariant 8) at every size that it accepts, or it is rejected."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lorac
from lorac.testing import assert_close
from tests import zoo
from tests.refusing import refuses

Forward = Callable[..., Tensor]


class Host(nn.Module):
    """A linear layer, and around it whatever forward a test is about."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(6, 5)
        self.compute = forward
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.compute(self, x, other)


def _rows(host: Host, x: Tensor, other: Any) -> Tensor:
    return torch.stack([host.linear(x)[i] * (i + 1) for i in range(x.shape[0])])


def _x(batch: int, width: int = 6) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(batch))


def _compiled(forward: Forward, *inputs: Tensor, target: str = "onnxruntime", **options: Any) -> tuple[Host, Any]:
    host = Host(forward)
    adapters = {"a": lorac.LoRA(r=2, alpha=2, targets=["linear"])}
    given = {"example_inputs": inputs, "active": None, **options}
    return host, lorac.compile(host, adapters, target=target, **given)


@contextmanager
def _one_warning(text: str) -> Iterator[None]:
    with pytest.warns(lorac.LoracWarning, match=text) as caught:
        yield
    assert len(caught) == 1, [str(warning.message) for warning in caught]


# ── Sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────
FIXED = r"the trace of the model fixed sizes that should vary: axis 0 of 'x', at 2"


def _refuses_another_batch(compiled: Any, host: Host) -> None:
    assert_close(compiled(_x(2)), host(_x(2)).detach())
    at = r"test_fidelity\.py:\d+: return torch.stack\(.* for i in range\(x.shape\[0\]\)\]\)"
    with pytest.raises(
        lorac.InputMismatch, match=f"'x' has size 3 on axis 0; the trace of the model fixed 2, at .*{at}"
    ):
        compiled(_x(3))
    assert re.search(rf"axis 0 of 'x' is fixed to 2 by the trace of the model, at .*{at}", str(compiled.explain()))


def test_rejects_sizes_other_than_the_one_that_the_trace_fixed(tmp_path: Path):
    with _one_warning(FIXED):
        host, compiled = _compiled(_rows, _x(2))
    session = compiled.engine.graphs["main"].session
    assert next(value.shape for value in session.get_inputs() if value.name == "x") == [2, 6]
    _refuses_another_batch(compiled, host)
    compiled.save(tmp_path / "artifact")
    _refuses_another_batch(lorac.load(tmp_path / "artifact"), host)


@pytest.mark.medium("the program that was not stored")
def test_stored_eager_programs_reject_other_sizes(tmp_path: Path):
    host, compiled = _compiled(_rows, _x(2), target="eager")
    assert_close(compiled(_x(3)), host(_x(3)))  # the host itself takes any size
    with _one_warning(FIXED):
        compiled.save(tmp_path / "artifact")
    for target in ("eager", "onnxruntime"):
        _refuses_another_batch(lorac.load(tmp_path / "artifact", target=target), host)


@pytest.mark.medium("one way to fix", keep=["shapes0"])
@pytest.mark.parametrize("shapes", [{"x": None}, {"x": {0: Dim.STATIC}}, {"x": {0: 2}}, ({},)])
def test_does_not_warn_of_sizes_that_are_fixed_by_request(shapes: Any):
    _, compiled = _compiled(_rows, _x(2), dynamic_shapes=shapes)
    with pytest.raises(lorac.InputMismatch, match="dynamic_shapes="):
        compiled(_x(3))
    assert "trace" not in str(compiled.explain())


@pytest.mark.medium("given shapes", keep=["shapes1"])
@pytest.mark.parametrize("shapes", [None, {"x": {0: Dim.AUTO}}, ({0: Dim("rows")},), [[Dim.AUTO, None]]])
def test_accepts_other_sizes_after_an_example_of_size_1(shapes: Any):
    host, compiled = _compiled(lambda host, x, other: host.linear(x), _x(1), dynamic_shapes=shapes)
    for batch in (1, 4):
        assert_close(compiled(_x(batch)), host(_x(batch)).detach())


def _small(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x) * 2 if x.shape[0] <= 5 else host.linear(x)


def _alone(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x) * 2 if x.shape[0] == 1 else host.linear(x)


def _pairs(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x).reshape(-1, 2, 5).sum(1)


def _threes(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x) if x.shape[0] % 3 else host.linear(x) * 2


@pytest.mark.medium("a size below the example's", keep=["_small*"])
@pytest.mark.parametrize(
    ("forward", "right", "refused"),
    [(_small, (1, 2, 5), (0, 6, 9)), (_alone, (2, 7), (1,)), (_pairs, (2, 4, 8), (1, 5)), (_threes, (1, 2, 7), (3, 6))],
)
def test_rejects_a_size_at_which_the_model_branches_otherwise(
    forward: Forward, right: tuple[int, ...], refused: tuple[int, ...]
):
    """Silence would be another function's answer: torch checks no sizes once a program is captured."""
    host, compiled = _compiled(forward, _x(4))
    for batch in right:
        assert_close(compiled(_x(batch)), host(_x(batch)).detach())
    for batch in refused:
        with pytest.raises(lorac.InputMismatch, match=rf"size {batch} on axis 0 of 'x': it needs"):
            compiled(_x(batch))


def test_inputs_that_the_model_joins_must_fit_each_other():
    host, compiled = _compiled(lambda host, x, other: host.linear(x * other), _x(4), _x(4))
    assert_close(compiled(_x(3), _x(3)), host(_x(3), _x(3)).detach())
    with pytest.raises(lorac.InputMismatch, match="size 2 on axis 0 of 'other' and size 3 on axis 0 of 'x'"):
        compiled(_x(3), _x(2))


# ── Fidelity ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _otherwise(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x) * (2 if torch.compiler.is_exporting() else 1)


def _elsewhere(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x) - (x[:2] if torch.compiler.is_exporting() else x).mean()


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (_otherwise, r"another program than Host: 'output' is off by 1 of its size on inputs of x \[2, 6\]"),
        (_elsewhere, r"program than Host: 'output' is off by .* on inputs of x \[3, 6\]\n  give dynamic_shapes="),
    ],
)
def test_rejects_a_program_that_differs_from_the_model(forward: Forward, text: str):
    """Not as the emitter's fault, whose self-test compares with the program."""
    with refuses("capture_differs", match=text):
        _compiled(forward, _x(2))


def test_self_test_false_keeps_a_program_that_differs():
    host, compiled = _compiled(_otherwise, _x(2), self_test=False)
    assert_close(compiled(_x(1)), 2 * host(_x(1)).detach())


def test_compares_an_eager_program_with_the_model_when_it_is_saved(tmp_path: Path):
    _, compiled = _compiled(_otherwise, _x(2), target="eager")
    with refuses("capture_differs"):
        compiled.save(tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_outputs_that_are_infinite_where_the_hosts_are_do_not_differ():
    forward = lambda host, x, other: host.linear(x).masked_fill(x[:, :5] > 0, float("-inf"))  # noqa: E731  (one line)
    host, compiled = _compiled(forward, _x(2))
    assert_close(compiled(_x(3)).exp(), host(_x(3)).detach().exp())


def test_a_bfloat16_host_is_compared_in_its_own_dtype(tmp_path: Path):
    host = Host(lambda host, x, other: torch.tanh(host.linear(x)).cumsum(0)).bfloat16()
    compiled = lorac.compile(host, {}, example_inputs=(_x(2).bfloat16(),))
    compiled.save(tmp_path / "artifact")
    assert_close(lorac.load(tmp_path / "artifact")(_x(3).bfloat16()), host(_x(3).bfloat16()))


# ── What no program can show ─────────────────────────────────────────────────────────────────────────────────────────
def _dropout(host: Host, x: Tensor, other: Any) -> Tensor:
    return nn.functional.dropout(host.linear(x), 0.5, training=True)


def _python(host: Host, x: Tensor, other: Any) -> Tensor:
    return host.linear(x) * random.random()


@pytest.mark.medium("dropout", cases=["_python-*"])
@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (_dropout, "the model is stochastic: .* the program draws at each call, too$"),
        (_python, "the model is stochastic: .* the program repeats what was drawn when it was captured, and could not"),
    ],
)
def test_names_a_stochastic_model(forward: Forward, text: str, tmp_path: Path):
    states = torch.get_rng_state(), random.getstate()
    with _one_warning(text):
        _, compiled = _compiled(forward, _x(2))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert "the model is stochastic" in str(compiled.explain())
    assert compiled(_x(3)).shape == (3, 5)
    compiled.save(tmp_path / "artifact")
    assert "the model is stochastic" in str(lorac.load(tmp_path / "artifact").explain())


def test_accepts_random_numbers_that_are_not_used():
    _compiled(lambda host, x, other: (host.linear(x), torch.rand(2))[0], _x(2))


def _counts(host: Host, x: Tensor, other: Any) -> Tensor:
    host.seen += 1
    return host.linear(x) * host.seen


def _remembers(host: Host, x: Tensor, other: Any) -> Tensor:
    host.calls += 1
    return host.linear(x) * host.calls


@pytest.mark.medium("the other host", cases=["_counts*"])
@pytest.mark.parametrize(("forward", "what"), [(_counts, "'seen'"), (_remembers, "its attributes")])
def test_warns_of_state_that_calls_change_and_restores_it(forward: Forward, what: str):
    with _one_warning(f"the model.s answers depend on what earlier calls left in {what}"):
        host, compiled = _compiled(forward, _x(2))
    assert not host.seen.any() and not host.calls
    first = copy.deepcopy(host)(_x(3)).detach()
    assert_close(compiled(_x(3)), first)
    assert "what earlier calls left in" in str(compiled.explain())


@pytest.mark.medium("test_warns_of_state_that_calls_change_and_restores_it")
def test_accepts_a_written_buffer_that_no_output_reads():
    def forward(host: Host, x: Tensor, other: Any) -> Tensor:
        host.seen.fill_(3.0)
        return host.linear(x)

    host, _ = _compiled(forward, _x(2))
    assert not host.seen.any()


def _halves(host: Host, x: Tensor, other: Any) -> Tensor:
    with torch.no_grad():
        host.linear.weight.mul_(0.5)
    return host.linear(x)


def _halves_data(host: Host, x: Tensor, other: Any) -> Tensor:
    host.linear.weight.data.mul_(0.5)  # torch.export takes no write of this kind, and names no weight
    return host.linear(x)


@pytest.mark.parametrize("forward", [_halves, _halves_data])
def test_rejects_a_model_that_writes_its_weights(forward: Forward):
    host = Host(forward)
    before, mark = host.linear.weight.detach().clone(), zoo.fingerprint(host)
    with refuses("capture_failed", match=r"forward of Host writes into its own weight 'linear\.weight'"):
        lorac.compile(host, {}, target="onnxruntime", example_inputs=(_x(2),))
    assert torch.equal(host.linear.weight, before) and zoo.fingerprint(host) == mark


def test_rejects_a_model_with_its_own_generator():
    host = Host(lambda host, x, other: host.linear(x) + torch.rand(5, generator=host.generator))
    host.generator = torch.Generator().manual_seed(3)  # type: ignore[assignment]  (not a module's usual attribute)
    before = host.generator.get_state()
    with refuses("capture_failed", match="forward uses a Generator of the model"):
        lorac.compile(host, {}, target="onnxruntime", example_inputs=(_x(2),))
    assert torch.equal(host.generator.get_state(), before)


# ── Models as they are ───────────────────────────────────────────────────────────────────────────────────────────────
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}


def _model(name: str, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)
    return model(model.config_class(**config)).eval()


def _answers_or_refuses(model: Any, compiled: Any, shape: tuple[int, int]) -> bool:
    """Whether it answers; if so, as the model does."""
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(shape[0], 3, 32, 32)}
    else:
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 90 + 3
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = {name: value for name, value in inputs.items() if name in compiled.engine.interfaces["main"].inputs}
    try:
        found = compiled(**inputs)
    except lorac.InputMismatch:
        return False
    with torch.no_grad():
        wanted = model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))
    assert_close(found[0], wanted[0])
    return True


SIZES = [(2, 7), (1, 7), (3, 9), (1, 1), (2, 4), (1, 30)]


def _tried(name: str, config: dict[str, Any]) -> list[tuple[int, int]]:
    """The sizes at which a model's program answers, of those tried."""
    model = _model(name, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorac.LoracWarning)
        compiled = lorac.compile(model, {}, target="onnxruntime")
    return [shape for shape in SIZES if _answers_or_refuses(model, compiled, shape)]


@pytest.mark.slow("batches of two")
def test_a_model_that_loops_over_its_images_takes_any_number_of_them():
    assert {batch for batch, _ in _tried("PixtralVisionModel", IMAGE)} == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MambaForCausalLM", {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
        ("FalconMambaForCausalLM", {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
        ("BambaForCausalLM", {**TEXT, **MAMBA, "num_key_value_heads": 2, "attn_layer_indices": [1]}),
        ("FalconH1ForCausalLM", {**TEXT, **MAMBA, "num_key_value_heads": 2, "mamba_d_ssm": 64}),
        ("RecurrentGemmaForCausalLM", {**TEXT, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}),
        ("FunnelForMaskedLM", {"vocab_size": 99, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8}),
    ],
)
def test_recurrent_models_match_or_reject_every_size(name: str, config: dict[str, Any]):
    assert (2, 7) in _tried(name, config)


@pytest.mark.medium("test_rejects_a_program_that_differs_from_the_model")
def test_rejects_a_program_with_another_mask():
    """The model leaves the causal mask out where nothing is masked; the program has it always."""
    model = _model("Aimv2TextModel", **{k: v for k, v in TEXT.items() if k != "pad_token_id"})
    with refuses("capture_differs", match="than Aimv2TextModel: 'last_hidden_state' is off by"):
        lorac.compile(model, {}, target="onnxruntime")


@pytest.mark.medium("test_names_a_stochastic_model")
def test_a_masked_autoencoder_that_masks_at_random_is_named():
    config = {**IMAGE, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 1}
    with _one_warning("the model is stochastic"):
        lorac.compile(_model("ViTMAEModel", **config), {}, target="onnxruntime")


@pytest.mark.slow
def test_a_model_that_rescales_its_weights_once_compiles_after_its_first_call():
    config = {"vocab_size": 99, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4}
    model = _model("RwkvForCausalLM", **config, context_length=64, rescale_every=2)
    with refuses("capture_failed", match=r"own weight 'rwkv\.blocks\.0\.attention\.output\.weight'"):
        lorac.compile(model, {}, target="onnxruntime")
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        wanted = model(ids, use_cache=False)[0]
    with pytest.warns(lorac.LoracWarning, match="axis 1 of 'input_ids', at 7"):
        compiled = lorac.compile(model, {}, target="onnxruntime")
    assert_close(compiled(input_ids=ids)[0], wanted)
