"""peft_type LORA, read and written, against PEFT's outputs in float64."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import nn

import lorac
from lorac import DoRA, LoRA, load_adapter, save_adapter
from tests import parity, peft_files
from tests.formats.oracle import applied, assert_round_trip, call, round_trip
from tests.refusing import refuses
from tests.zoo import ZOO

LLAMA = ["q_proj", "down_proj"]


@pytest.mark.medium(
    "a Llama and a GPT-2", keep=["tiny_llama-config5-True", "tiny_gpt2-config4-True", "plain_mlp-*", "*-config3-*"]
)
@pytest.mark.slow("the same configurations from the model's own dtype", cases=["tiny_*-False"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain_mlp", {"target_modules": ["embed", "up", "down", "head"], "r": 3, "lora_alpha": 5}),
        ("plain_mlp", {"target_modules": ["up", "down"], "r": 1, "use_rslora": True}),
        (
            "plain_mlp",
            {
                "target_modules": ["up", "down", "head"],
                "r": 4,
                "use_rslora": True,
                "rank_pattern": {"down": 2, "u.": 3},
                "alpha_pattern": {"head": 3, "down|up": 17},
            },
        ),
        ("plain_conv", {"target_modules": ["stem", "line", "head"], "r": 3}),
        ("tiny_gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
        ("tiny_llama", {"target_modules": "all-linear", "r": 2}),
        ("tiny_llama", {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\..*"}),
        ("tiny_llama", {"target_modules": LLAMA, "layers_to_transform": [0, 2]}),
        (
            "tiny_llama",
            {"target_modules": LLAMA, "layers_to_transform": 1, "layers_pattern": "layers"},
        ),
        ("tiny_llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("tiny_llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
        ("tiny_bert", {"target_modules": ["query", "value"], "bias": "all"}),
        ("tiny_bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
        ("tiny_bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
        ("tiny_bert", {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"}),
        ("tiny_bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        ("tiny_t5", {"target_modules": ["q", "wo"]}),
        ("tiny_albert", {"target_modules": ["query", "ffn"]}),
    ],
)
def test_parity_and_round_trip(tmp_path: Path, name: str, config: dict[str, Any], dora: bool) -> None:
    adapter = assert_round_trip(name, tmp_path, LoraConfig(**config, use_dora=dora))
    assert type(adapter.variant) is (DoRA if dora else LoRA)
    assert adapter.name == "first"


@pytest.mark.medium("a model of linear layers", keep=["plain_mlp-config0", "plain_mlp-config1"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain_mlp", {"target_modules": ["up", "head"], "lora_bias": True}),
        ("plain_mlp", {"target_modules": ["up", "down"], "lora_bias": True, "use_rslora": True}),
        ("plain_conv", {"target_modules": ["stem", "grouped", "line"], "r": 4, "lora_bias": True}),
        ("plain_conv", {"target_modules": ["grouped", "head"], "r": 2}),
        ("tiny_gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    ],
)
def test_round_trips_without_dora(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    assert_round_trip(name, tmp_path, LoraConfig(**config))


def test_conv3d(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv3d(3, 5, (2, 1, 3)), nn.Flatten(), nn.Linear(30, 4)).double()
    inputs = {"input": torch.randn(2, 3, 4, 2, 3, dtype=torch.float64)}
    for dora in (False, True):
        config = LoraConfig(r=2, target_modules=["0", "2"], use_dora=dora)
        adapter = round_trip(model, inputs, tmp_path / str(dora), config)
        assert adapter.tensors["0"]["lora_A"].shape == (2, 3 * 2 * 1 * 3)


def test_shapes_and_scale_are_the_matrix_convention(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["stem", "grouped"], use_rslora=True)
    adapter = assert_round_trip("plain_conv", tmp_path, config)
    assert isinstance(adapter.variant, LoRA)
    assert adapter.variant.scale == 6 / math.sqrt(4)
    assert adapter.tensors["stem"]["lora_A"].shape == (4, 6 * 9)
    b = adapter.tensors["grouped"]["lora_B"]
    assert b.shape == (8, 4)
    assert b[:4, 2:].count_nonzero() == 0 == b[4:, :2].count_nonzero()


def test_modules_to_save_is_a_suffix_of_the_path_to_peft(tmp_path: Path) -> None:
    """`own` saves `down`: no dot is needed before it."""
    config = LoraConfig(target_modules=["up"], modules_to_save=["own"])
    adapter = assert_round_trip("plain_mlp", tmp_path, config)
    assert set(adapter.replaced) == {"down.weight"}


@pytest.mark.medium("test_untied_modules_to_save")
def test_saved_module_with_buffers(tmp_path: Path) -> None:
    model = ZOO["resnet18"].fresh(torch.float64)
    inputs = ZOO["resnet18"].inputs(dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["fc"], modules_to_save=["layer4.1.bn2"])
    adapter = round_trip(model, inputs, tmp_path, config)
    assert {name.rpartition(".")[2] for name in adapter.replaced} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


def tied_llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    config: Any = ZOO["tiny_llama"].model().config
    config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.double().eval()


EMBED, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.medium("the same with tensors that are stored once; the other targets", cases=["*False", "targets1-True"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"], r".*embed_tokens|.*q_proj"])
def test_tied_targets(tmp_path: Path, targets: list[str] | str, dora: bool) -> None:
    """ensure_weight_tying adapts both sides by one pair, crossed; the file holds it twice."""
    config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True, use_dora=dora)
    adapter = round_trip(tied_llama(), ZOO["tiny_llama"].inputs(), tmp_path, config)
    head, embed = adapter.tensors[HEAD], adapter.tensors[EMBED]
    assert adapter.provenance["tied"] == {HEAD: EMBED}
    assert head["lora_A"].data_ptr() == embed["lora_B"].data_ptr()
    assert head["lora_B"].data_ptr() == embed["lora_A"].data_ptr()
    written = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert written["ensure_weight_tying"] is True


def test_untied_target_of_a_tied_weight(tmp_path: Path) -> None:
    """Without it a term belongs to the side it names."""
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    adapter = round_trip(tied_llama(), ZOO["tiny_llama"].inputs(), tmp_path, config)
    assert list(adapter.tensors) == [EMBED]


@pytest.mark.medium("the head", cases=["embed_tokens"])
@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_tied_modules_to_save(tmp_path: Path, saved: str) -> None:
    """Whichever side is named, both are saved, and are one tensor."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[saved], ensure_weight_tying=True)
    adapter = round_trip(tied_llama(), ZOO["tiny_llama"].inputs(), tmp_path, config)
    assert set(adapter.replaced) == {f"{EMBED}.weight", f"{HEAD}.weight"}
    assert adapter.replaced[f"{EMBED}.weight"] is adapter.replaced[f"{HEAD}.weight"]


def test_untied_modules_to_save(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = round_trip(tied_llama(), ZOO["tiny_llama"].inputs(), tmp_path, config)
    assert set(adapter.replaced) == {f"{EMBED}.weight"}


def test_ties_that_training_has_broken_are_not_written(tmp_path: Path) -> None:
    model, inputs = tied_llama(), ZOO["tiny_llama"].inputs()
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter = round_trip(model, inputs, tmp_path, config)
    adapter.tensors[HEAD]["lora_A"] = 0.9 * adapter.tensors[HEAD]["lora_A"]
    save_adapter(adapter, tmp_path / "broken", model=model)
    again = load_adapter(tmp_path / "broken", model)
    assert again.provenance["tied"] == {}
    assert set(again.tensors) == {EMBED, HEAD}
    peft = call(peft_files.load_peft(model, tmp_path / "broken"), inputs)
    parity.assert_parity(call(applied(model, again), inputs), peft, call(model, inputs), names=["logits"])


def test_resized_embedding_is_a_replacement(tmp_path: Path) -> None:
    """save_embedding_layers=True saves embeddings that are no target; PEFT loads them."""
    inputs = ZOO["tiny_llama"].inputs()
    base, resized = ZOO["tiny_llama"].fresh(torch.float64), ZOO["tiny_llama"].fresh(torch.float64)
    with torch.no_grad():
        resized.get_parameter("model.embed_tokens.weight").mul_(1.1)
    config = LoraConfig(target_modules=["q_proj"])
    peft_files.make_peft(resized, tmp_path / "a", config, inputs=inputs, outputs=["logits"], save_embedding_layers=True)
    adapter = load_adapter(tmp_path / "a", base)
    assert set(adapter.replaced) == {"model.embed_tokens.weight"}  # lm_head is the base's own
    oracle = call(peft_files.load_peft(base, tmp_path / "a"), inputs)
    parity.assert_parity(call(applied(base, adapter), inputs), oracle, call(base, inputs), names=["logits"])
    save_adapter(adapter, tmp_path / "b", model=base)
    assert load_adapter(tmp_path / "b", base).replaced.keys() == adapter.replaced.keys()
    assert set(load_adapter(tmp_path / "a").replaced) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"init_lora_weights": "mica"}, marks=peft_files.of_peft_0_21),
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"velora_config": peft_files.make_config("VeloraConfig", num_groups=2)},
        {"monteclora_config": peft_files.make_config("MontecloraConfig")},
        {"lora_dropout": 0.3},
    ],
    ids=lambda extra: "-".join(map(str, extra.values()))[:30],
)
def test_ignores_fields_that_matter_only_in_training(tmp_path: Path, extra: dict[str, Any]) -> None:
    """PEFT's outputs are those of a plain LoRA, whatever these say."""
    peft_files.skip_absent(*(name for name, value in extra.items() if value is None))
    model, inputs = ZOO["plain_mlp"].fresh(), ZOO["plain_mlp"].inputs()
    config = LoraConfig(r=2, target_modules=["up", "down"], **extra)
    oracle = peft_files.make_peft(model, tmp_path, config, inputs=inputs)
    adapter = load_adapter(tmp_path, model)
    ours = call(applied(model, adapter), inputs)
    parity.assert_parity(ours, call(oracle, inputs), call(model, inputs))


@torch.no_grad()
def test_dora_of_a_grouped_convolution_has_pefts_norms(tmp_path: Path) -> None:
    """PEFT's norm there is not that of the rows of W + s·B·A; where a file has it so, lorac does, too."""
    entry = ZOO["plain_conv"]
    model, inputs = entry.fresh(), entry.inputs()
    config = LoraConfig(r=4, target_modules=["grouped", "stem"], use_dora=True, init_lora_weights=False)
    with peft_files.quiet():
        oracle: Any = get_peft_model(entry.fresh(), config).eval()  # type: ignore[arg-type]
    magnitude = oracle.get_submodule("base_model.model.grouped").lora_magnitude_vector["default"].weight
    magnitude.mul_(torch.linspace(-0.5, 2.5, magnitude.numel()).view_as(magnitude))
    oracle.save_pretrained(str(tmp_path / "f"))
    for base in (model, None):
        adapter = load_adapter(tmp_path / "f", base)
        answer = lorac.compile(model, {"a": adapter})(**inputs)
        parity.assert_parity(answer, call(oracle, inputs), call(model, inputs))
        save_adapter(adapter, tmp_path / "g", model=model)
        before, after = (load_file(tmp_path / folder / peft_files.WEIGHTS) for folder in ("f", "g"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    plain = lorac.compile(model, {"a": DoRA(r=4, targets=("grouped",))}).adapters["a"]
    with refuses("unsupported_field", match="PEFT computes other norms"):
        save_adapter(plain, tmp_path / "x", model=model)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtypes_of_file_and_base_may_differ(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    stored, own = dtypes
    model, inputs = ZOO["tiny_llama"].fresh(), ZOO["tiny_llama"].inputs()
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    peft_files.make_peft(model, tmp_path, config, inputs=inputs, outputs=["logits"], dtype=stored)
    adapter = load_adapter(tmp_path, model.to(own))
    assert {t.dtype for t in adapter.parameters()} == {stored}


def test_pickled_weights(tmp_path: Path) -> None:
    model, inputs = ZOO["plain_mlp"].fresh(), ZOO["plain_mlp"].inputs()
    config = LoraConfig(target_modules=["up"])
    peft_files.make_peft(model, tmp_path, config, inputs=inputs)
    safe = load_adapter(tmp_path, model)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    pickled = load_adapter(tmp_path, model)
    assert torch.equal(pickled.tensors["up"]["lora_A"], safe.tensors["up"]["lora_A"])
    assert load_adapter(tmp_path / "adapter_model.bin", model).name == tmp_path.name


def test_rank_pattern_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    """The first pattern that fits wins, so sorting them, as PEFT does on saving, is not harmless."""
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    config = LoraConfig(r=4, target_modules=["up"], alpha_pattern={"up": 2})
    peft_files.make_peft(model, tmp_path / "a", config, inputs=inputs)
    path = tmp_path / "a" / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["alpha_pattern"] = {"up": 2, "u.": 7}
    path.write_text(json.dumps(raw))
    adapter = load_adapter(tmp_path / "a", model)
    save_adapter(adapter, tmp_path / "b", model=model)
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert list(written["alpha_pattern"]) == ["up", "u."]
    for folder in ("a", "b"):
        oracle = call(peft_files.load_peft(model, tmp_path / folder), inputs)
        ours = call(applied(model, adapter), inputs)
        parity.assert_parity(ours, oracle, call(model, inputs))


class Narrow(nn.Module):
    """A head like MobileBERT's, whose layer pads its embedding to the hidden size, here by no feature."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.rest = nn.Linear(4, 3), nn.Linear(4, 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.up(x), self.rest(x)], dim=-1)


@torch.no_grad()
def test_a_layer_without_outputs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a layer that it starts with no values
        model, x = Narrow().eval(), torch.randn(2, 4)
        oracle = peft_files.make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["up", "rest"]), inputs={"x": x})
    parity.assert_parity(lorac.compile(model, {"a": tmp_path})(x), oracle(x), model(x))


@torch.no_grad()
def test_qalora_pools_inputs_as_pefts_layer_of_quantised_weights(tmp_path: Path) -> None:
    """PEFT gives GPTQ's layers alone the variant; here its code is given to plain ones."""
    entry = ZOO["plain_mlp"]
    model, inputs = entry.fresh(torch.float64), entry.inputs()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up"], use_qalora=True, qalora_group_size=2)
    oracle: Any = get_peft_model(entry.fresh(torch.float64), config)  # type: ignore[arg-type]
    layer, variant = oracle.get_submodule("base_model.model.up"), QALoraLinearVariant()
    variant.init(layer, "default", config)
    layer.lora_variant["default"] = variant
    layer.lora_B["default"].weight.normal_(0, 0.1)
    oracle.eval().save_pretrained(str(tmp_path / "f"))
    adapter = load_adapter(tmp_path / "f", model)
    assert adapter.variant == lorac.QALoRA(r=3, alpha=5, group_size=2, targets=adapter.variant.targets)
    for mode in ("live", "baked"):
        answer = lorac.compile(model, {"a": adapter}, mode=mode)(**inputs)
        parity.assert_parity(answer, oracle(**inputs), model(**inputs))
    save_adapter(adapter, tmp_path / "g", model=model)
    before, after = (load_file(tmp_path / folder / peft_files.WEIGHTS) for folder in ("f", "g"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(lorac.LoracError, match="lora_A"):  # PEFT ignores use_qalora at a plain layer
        peft_files.configure(tmp_path / "f", qalora_group_size=5)
        load_adapter(tmp_path / "f", model)
