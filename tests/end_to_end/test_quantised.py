"""``weights="int8"`` and ``"int4"``: adapters next to quantised weights, the stored codes, and rejected options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.export import Dim

import lorac
from lorac import OptionError, Unavailable
from lorac.backends.onnx import self_test
from lorac.backends.onnx.model_files import WEIGHTS_FILE
from lorac.backends.onnx.quantised.codec import Codec
from tests.emitted import load_emitted_proto
from tests.parity import assert_parity
from tests.peft_files import make_peft
from tests.refusing import refuses

WIDTH, IDS = 64, 48
TARGETS = ["embed", "up", "down", "head"]


class Reader(nn.Module):
    """A table tied to the output layer, layers with and without a bias, one with short rows, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(IDS, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.up, self.short, self.down = nn.Linear(WIDTH, 80), nn.Linear(10, 80, bias=False), nn.Linear(80, WIDTH)
        self.head = nn.Linear(WIDTH, IDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.down(torch.tanh(self.up(x) + self.short(x[..., :10])))
        return cast(Tensor, self.head(torch.tanh(x)))


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, IDS, (batch, length), generator=torch.Generator().manual_seed(batch))


def as_held(codec: Codec, head: Codec) -> nn.Module:
    """The model with what quantised weights come to, the tied table by a codec of its own."""
    model = Reader().eval()
    with torch.no_grad():
        for layer, used in ((model.embed, head), (model.up, codec), (model.down, codec)):
            layer.weight.copy_(torch.from_numpy(used.encode(layer.weight.numpy()).decode().copy()))
    return model


@dataclass
class Made:
    """A compiled model, PEFT's adapters over what its weights come to, and what the self-test was given."""

    compiled: Any
    base: nn.Module
    peft: dict[str, Any]
    folders: dict[str, Path]
    tested: list[Any]


CASES = {
    "int4, symmetric": {"weights": "int4"},
    "int8, asymmetric": {"weights": "int8", "block_size": 16, "symmetric": False},
    "int4, asymmetric": {"weights": "int4", "head": "int4", "block_size": 64, "symmetric": False},
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    options = CASES[request.param]
    stored = (str(options["weights"]), str(options.get("head", "int8")))
    block, symmetric = cast(int, options.get("block_size", 32)), cast(bool, options.get("symmetric", True))
    codecs = [Codec({"int4": 4, "int8": 8}[bits], block, symmetric) for bits in stored]
    base, place = as_held(*codecs), tmp_path_factory.mktemp("adapters")
    configs = {
        "lora": LoraConfig(r=3, target_modules=TARGETS),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["embed", "up", "down"]),
    }
    peft = {n: make_peft(base, place / n, config, inputs={"ids": ids()}) for n, config in configs.items()}
    tested: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "run_self_test", lambda *args: tested.append(args))
        compiled = lorac.compile(
            Reader().eval(),
            {n: place / n for n in configs},
            target="onnxruntime",
            active=None,
            example_inputs={"ids": ids()},
            dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}},
            accuracy_level=1,
            **options,
        )
    yield Made(compiled, base, peft, {n: place / n for n in configs}, tested)


@pytest.mark.medium("symmetric ones; codes of four bits")
@pytest.mark.slow("the narrower codes, with zero points", keep=["int4, asymmetric"])
@torch.no_grad()
def test_adapters_act_next_to_dequantised_weights(made: Made) -> None:
    """LoRA and DoRA, whose scale is of the weight that the session computes with; other sizes, mixtures, and undo."""
    bits = made.compiled(ids=ids())
    for batch, length in ((2, 5), (3, 7), (1, 1)):
        given = ids(batch, length)
        for name, oracle in made.peft.items():
            found = made.compiled(ids=given, adapters=name)
            assert_parity(found, oracle(given), made.base(given))
    for choice in ("dora", {"lora": 0.5, "dora": 1.5}, "lora", None):
        made.compiled.swap(choice)
    assert torch.equal(made.compiled(ids=ids()), bits)


@pytest.mark.medium("symmetric ones; codes of four bits", cases=["int4, asymmetric*", "int8, asymmetric*"])
def test_the_self_test_compares_with_dequantised_weights(made: Made) -> None:
    engine, program, snapshot, computed = made.tested[0]
    self_test.run_self_test(engine, program, snapshot, computed)
    if engine.options.weights == "int4":  # int8 is nearer than a lost slot would be far
        with refuses("self_test_failed"):
            self_test.run_self_test(engine, program, snapshot)


@pytest.mark.medium("symmetric ones; codes of four bits", cases=["int4, asymmetric*", "int8, asymmetric*"])
def test_explains_which_weights_stay_in_float(made: Made) -> None:
    text = str(made.compiled.explain())
    options = made.compiled.engine.options
    kind = "symmetric" if options.codec.symmetric else "asymmetric"
    head = options.head_codec.name
    stored = {options.weights: 3} if head == options.weights else {head: 1, options.weights: 2}
    for bits, count in stored.items():
        assert f"weights: {count} stored as {bits}, {kind}, in blocks of {options.block_size}: " in text
    assert "weights that stay as they are, read by Conv: conv.weight" in text
    assert f"weights that stay as they are, rows shorter than a block of {options.block_size}: short" in text


@pytest.mark.medium("symmetric ones; codes of four bits", cases=["int4, asymmetric*", "int8, asymmetric*"])
def test_no_file_has_a_weight_in_float(made: Made) -> None:
    files = {name: held.where.read_bytes() for name, held in made.compiled.engine.files.items()}
    model = Reader()
    for layer in (model.embed, model.up, model.down):
        for rows in (layer.weight, layer.weight.t()):
            part = rows.detach().contiguous().numpy().tobytes()[:64]
            assert [name for name, content in files.items() if part in content] == []
    packed = [part for part in files[WEIGHTS_FILE].split(made_bytes(made)) if part is not None]
    assert len(packed) == 2, "the tied table is stored once"


def made_bytes(made: Made) -> bytes:
    """The quantised bytes of the tied table."""
    codec = made.compiled.engine.options.head_codec
    assert codec is not None
    return bytes(codec.encode(Reader().embed.weight.detach().numpy()).packed.tobytes())


@pytest.mark.medium("symmetric ones; codes of four bits", cases=["int4, asymmetric*", "int8, asymmetric*"])
def test_four_bits_are_small(made: Made) -> None:
    sizes = {name: held.size for name, held in made.compiled.engine.files.items()}
    model = Reader()
    whole = sum(4 * layer.weight.numel() for layer in (model.embed, model.up, model.down))
    others = 4 * (model.conv.weight.numel() + model.short.weight.numel())
    share = (sizes[WEIGHTS_FILE] - others) / whole
    assert share < {"int4": 0.2, "int8": 0.4}[made.compiled.engine.options.head or "int8"]
    assert sizes["base.safetensors"] < whole / 2


LOADED = """
import json, sys
import onnxruntime, torch, lorac
folder, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
compiled = lorac.load(folder)
compiled.remove_adapter("dora")
compiled.add_adapter(adapter, "dora")
ids = torch.tensor(ids)
answers = {str(choice): compiled(ids=ids, adapters=choice).tolist() for choice in (None, "lora", "dora")}
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
answers["plain"] = session.run(None, {"ids": ids.numpy()})[0].tolist()
print(json.dumps(answers))
"""


@pytest.mark.medium("symmetric ones")
@pytest.mark.slow("artifacts of float weights do")
@pytest.mark.parametrize("made", ["int4, asymmetric"], indirect=True)
def test_an_artifact_answers_in_a_new_process(made: Made, tmp_path: Path) -> None:
    """Adapters too, among them one that is prepared there from the quantised weights; and plain ONNX Runtime."""
    made.compiled.save(tmp_path / "compiled")
    given = ids(3, 4)
    command = [sys.executable, "-c", LOADED, str(tmp_path / "compiled"), str(made.folders["dora"])]
    ran = subprocess.run([*command, json.dumps(given.tolist())], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for choice in (None, "lora", "dora"):
        assert torch.equal(torch.tensor(found[str(choice)]), made.compiled(ids=given, adapters=choice))
    assert found["plain"] == found["None"]


@torch.no_grad()
def test_bakes_before_it_quantises() -> None:
    model, inputs = Reader().eval(), {"ids": ids()}
    adapter = lorac.compile(model, {"a": lorac.LoRA(r=3, targets=TARGETS)}).adapters["a"]
    for tensor in adapter.parameters():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    options = {"target": "onnxruntime", "weights": "int4", "accuracy_level": 1, "example_inputs": inputs}
    baked = lorac.compile(model, {"a": adapter}, mode="baked", **options)
    held, codec, head = Reader().eval(), Codec(4, 32, True), Codec(8, 32, True)
    merged = lorac.compile(model, {"a": adapter}, mode="baked").host
    held.load_state_dict(merged.state_dict())
    held.embed.weight = nn.Parameter(merged.embed.weight)  # it is no longer tied
    for layer, used in ((held.embed, codec), (held.up, codec), (held.down, codec), (held.head, head)):
        layer.weight.copy_(torch.from_numpy(used.encode(layer.weight.numpy()).decode().copy()))
    assert_parity(baked(**inputs), held(**inputs), as_held(codec, head)(**inputs))


@pytest.mark.medium("the self-test of codes of four bits")
def test_rounded_activations_pass_the_self_test_and_an_adapter_can_be_added(tmp_path: Path) -> None:
    """The default level, with room for adapters that were saved with a hash of the float base."""
    model = Reader().eval()
    eager = lorac.compile(model, {"a": lorac.DoRA(r=2, targets=["up"])})
    lorac.save_adapter(eager.adapters["a"], tmp_path / "a", model=model)
    compiled = lorac.compile(
        model,
        target="onnxruntime",
        example_inputs={"ids": ids()},
        weights="int8",
        reserve=lorac.Reserve(targets=["up", "down"], rank=4, scales=True),
    )
    before = compiled(ids=ids())
    assert compiled.add_adapter(tmp_path / "a") == "a"
    compiled.swap("a")
    compiled.swap(None)
    assert torch.equal(compiled(ids=ids()), before)
    with refuses("not_mergeable", match=r"into the quantised weight of 'up'.*'shira' needs a merged weight there"):
        compiled.add_adapter(lorac.SHiRA(r=1, targets=["up"]))


@pytest.mark.parametrize(
    ("adapter", "mode", "says"),
    [
        (lorac.LoRA(r=2, targets=["up"]), "fused", "nothing can be merged into the quantised weight of 'up'"),
        (lorac.SHiRA(r=1, targets=["up"]), "auto", "and 'a' is sparse and so needs a merged weight"),
    ],
)
def test_nothing_is_merged_into_a_quantised_weight(adapter: Any, mode: str, says: str) -> None:
    with refuses("not_mergeable", match=says):
        lorac.compile(Reader().eval(), {"a": adapter}, target="onnxruntime", mode=mode, weights="int4")


def test_rejects_a_model_without_quantisable_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.float64)).eval()
    options = {"target": "onnxruntime", "example_inputs": (torch.ones(2, 64, dtype=torch.float64),)}
    with pytest.raises(
        Unavailable, match=r"no weight of the model can be stored as int4: '0\.weight' is of double numbers"
    ):
        lorac.compile(model, weights="int4", **options)


@pytest.mark.medium("runtime/test_traits.py, and codes of one model")
def test_each_component_has_a_base_of_its_own() -> None:
    """Layers of one shape in two graphs; their constants may bear one name."""
    torch.manual_seed(0)
    models = {name: nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64)).eval() for name in "ab"}
    compiled = lorac.compile(
        models,
        {"d": lorac.LoRA(r=2, targets=["0", "2"])},
        target="onnxruntime",
        example_inputs={name: (torch.ones(2, 64),) for name in models},
        weights="int4",
        self_test=False,
    )
    for path in ("a.0", "a.2", "b.0", "b.2"):
        weight = models[path[0]].get_parameter(f"{path[2]}.weight").detach()
        held = torch.from_numpy(Codec(4, 32, True).encode(weight.numpy()).decode().copy())
        assert torch.equal(compiled.session.base.weight(compiled.sites[path]), held)
    assert compiled.engine.files["base.safetensors"].size < 48 * 64 * 2


@pytest.mark.medium("symmetric ones; codes of four bits", cases=["int4, asymmetric*", "int8, asymmetric*"])
def test_nodes_have_the_requested_settings(made: Made) -> None:

    model = load_emitted_proto(made.compiled)
    held = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    settings = {a.name: a.i for a in held[0].attribute}
    options = made.compiled.engine.options
    assert (settings["accuracy_level"], settings["block_size"]) == (1, options.block_size)
    assert len(held) == 3


@pytest.mark.medium("the self-test of quantised weights")
def test_keeps_tables_of_positions_float() -> None:
    """With a cache what depends on positions alone lies in a table; buffers of sines are tables without one, too."""
    from tests.decoders import DECODERS

    adapters = {"one": lorac.LoRA(r=2, targets=["q_proj"])}
    compiled = lorac.compile(DECODERS["opt"](), adapters, target="onnxruntime", cache=True, weights="int4")
    assert compiled.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2).shape[1] <= 5
    assert "weights that stay as they are, tables that are no parameters" in str(compiled.explain())

    class Sines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("sines", torch.sin(torch.rand(32, 64)))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layer(nn.functional.embedding(ids, self.sines))

    options = {"weights": "int8", "example_inputs": (torch.tensor([[3, 4, 5]]),)}
    sines = lorac.compile(Sines().eval(), target="onnxruntime", **options)
    assert "weights that stay as they are, tables that are no parameters: sines" in str(sines.explain())


def test_rejects_a_head_that_the_model_lacks() -> None:
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    options = {"target": "onnxruntime", "weights": "int4", "example_inputs": (torch.ones(2, 64),)}
    with pytest.raises(OptionError, match="no output layer as large as an embedding"):
        lorac.compile(model, head="int8", **options)
