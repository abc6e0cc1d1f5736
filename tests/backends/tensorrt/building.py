"""Engines of the tensorrt target for tests: models of two layers, adapters of five methods, and plans."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE, graph_file, read_model_files
from lorac.backends.tensorrt import build, cpu_check
from lorac.backends.tensorrt.cpu_check import CpuEngine, widen_graph
from lorac.backends.tensorrt.engine import TrtEngine
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Program
from lorac.ir.graph.interpreter import read_example_inputs, run_graph
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from tests import zoo

THREE = ["8.6", "8.9", "12.0"]
NO_GPU = "a plan of TensorRT runs on a GPU"
WINDOW = 32
"""Values by which a weight is found in a plan: 128 bytes of float32."""
LARGE = 4096
"""Values from which a weight is large."""


def quietly(**arguments: Any) -> lorac.Compiled:
    """Compile for tensorrt, without the warning that there is no GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{NO_GPU}", category=lorac.LoracWarning)
        return lorac.compile(**{"target": "tensorrt", "target_capabilities": THREE, **arguments})


# ── Hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _llama() -> nn.Module:
    """Return two layers of SmolLM2's widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**widths, num_hidden_layers=2, vocab_size=64, use_cache=False))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    widths = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4}
    return BertModel(BertConfig(**widths, num_hidden_layers=2, vocab_size=64, max_position_embeddings=64))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    widths = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3}
    return ViTForImageClassification(ViTConfig(**widths, num_hidden_layers=2, image_size=32, patch_size=8))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    widths = {"d_model": 96, "d_kv": 24, "d_ff": 160, "num_heads": 4}
    config = T5Config(**widths, num_layers=2, vocab_size=64, use_cache=False, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


HOSTS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "bert": _bert,
    "vit": _vit,
    "t5": _t5,
    "resnet": zoo.resnet18,
}
EXAMPLES = {"resnet": (torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(1)),)}
TARGETS: Mapping[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "bert": ("query", "value", "intermediate.dense"),
    "vit": ("q_proj", "v_proj", "query", "value"),
    "t5": ("q", "v"),
    "resnet": ("layer1.0.conv1", "layer2.0.conv1", "fc"),
}
ROUTED = {"resnet": ("fc",), "t5": ("decoder.block.0.layer.0.SelfAttention.q",)}
"""Where routers go, of hosts where not all targets can have one, or have many."""


@functools.cache
def host(name: str) -> nn.Module:
    """Return a model, the same for all tests."""
    torch.manual_seed(0)
    return HOSTS[name]().eval()


def _found(name: str, wanted: tuple[str, ...]) -> list[str]:
    paths = lorac.sites(host(name))
    return [target for target in wanted if any(path.endswith(target) for path in paths)]


def variants(name: str) -> dict[str, Any]:
    """Return method -> a variant for a model; "one" has the least rank."""
    targets, routed = _found(name, TARGETS[name]), _found(name, ROUTED.get(name, TARGETS[name]))
    return {
        "lora": lorac.LoRA(r=4, targets=targets),
        "one": lorac.LoRA(r=1, targets=targets),
        "dora": lorac.DoRA(r=2, targets=targets),
        "ia3": lorac.IA3(targets=targets),
        "oft": lorac.OFT(block_size=4, r=0, targets=targets),
        "meteora": lorac.MeteoRA(r=2, experts=3, top_k=2, targets=routed),
    }


@functools.cache
def adapters(name: str) -> Mapping[str, lorac.Adapter]:
    """Return an adapter of each method, away from its init."""
    eager = lorac.compile(host(name), variants(name), active=None, example_inputs=EXAMPLES.get(name), self_test=False)
    for number, adapter in enumerate(eager.adapters.values()):
        away(adapter, number)
    return dict(eager.adapters)


@torch.no_grad()
def away(adapter: lorac.Adapter, seed: int) -> None:
    """Shake an adapter's floating-point tensors."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.parameters():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


# ── What was built ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Built:
    """A compiled model, and the engine and program of its self-test.

    Attributes:
        compiled: the model.
        tried: the emitted files as ONNX Runtime runs them.
        program: what they were emitted from.
        network: input of the network of graph ``main`` -> its dtype and shape.
        constants: what was baked into slots; of other modes nothing.
    """

    compiled: lorac.Compiled
    tried: CpuEngine
    program: Program
    network: Mapping[str, tuple[str, tuple[int, ...]]]
    constants: Mapping[str, Tensor]

    @property
    def engine(self) -> TrtEngine:
        """The engine."""
        assert isinstance(self.compiled.engine, TrtEngine)
        return self.compiled.engine

    @property
    def plan(self) -> bytes:
        """The plan of graph ``main``."""
        return self.engine.graphs["main"].file.read()

    def answers(self, choice: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of the emitted file on the example inputs, and those of the reference interpreter."""
        graph = widen_graph(self.program.graphs["main"])
        inputs, constants = read_example_inputs(graph, graph.interface.inputs), graph.exported.state_dict
        weights = {name: w.float() if w.is_floating_point() else w for name, w in constants.items()}
        contents = self._slot_tensors(choice)
        given = {} if self.engine.constant else contents
        return self.tried.outputs("main", given, inputs), run_graph(graph, inputs, contents, weights)

    def _slot_tensors(self, choice: Any) -> Mapping[str, Tensor]:
        """Return the slots' tensors for a choice."""
        if self.engine.constant:
            return self.constants
        self.compiled.swap(choice)
        if not self.engine.fused:
            return self.compiled.switch.state.bound.tensors
        self.tried.write(self.compiled.switch.state.snapshot)
        return self.tried.memory


def compile_recorded(**arguments: Any) -> Built:
    """Compile as ``quietly`` does, and record the self-test and the network."""
    programs: list[Program] = []
    tested: list[tuple[CpuEngine, Mapping[str, Tensor]]] = []
    networks: list[Any] = []
    check, test, check_inputs = cpu_check.check_on_cpu, cpu_check.run_self_test, build.check_inputs

    def record_program(backend: Any, emitted: Any) -> None:
        programs.append(emitted.program)
        check(backend, emitted)

    def record_test(tried: Any, program: Program, snapshot: ComposedWeights) -> None:
        tested.append((tried, _baked(tried, snapshot)))
        test(tried, program, snapshot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_check, "check_on_cpu", record_program)
        patch.setattr(cpu_check, "run_self_test", record_test)
        patch.setattr(build, "check_inputs", lambda *args: (networks.append(_inputs(args[0])), check_inputs(*args)))
        compiled = quietly(**arguments)
    (tried, constants), program = tested[0], programs[0]
    return Built(compiled, tried, program, networks[0], constants)


def _baked(tried: CpuEngine, snapshot: ComposedWeights) -> Mapping[str, Tensor]:
    if tried.mode != "baked":
        return {}
    return collect_slot_tensors(tried.slots, tried.plans, fill_slots(tried.plans, snapshot, tried.base))


def _inputs(parsed: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    values = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    return {value.name: (value.dtype.name, tuple(value.shape)) for value in values}


@functools.cache
def built(name: str, mode: str, dtype: str, methods: tuple[str, ...]) -> Built:
    """Compile a model with adapters of some methods, none of them active unless baked."""
    made = adapters(name)
    return compile_recorded(
        model=host(name),
        adapters={method: made[method] for method in methods},
        mode=mode,
        active=methods[0] if mode == "baked" else None,
        example_inputs=EXAMPLES.get(name),
        dtype=dtype,
    )


def weights_of(engine: TrtEngine) -> Mapping[str, Any]:
    """Return the large floating-point weights of graph ``main``'s model, by name."""
    _, weights = read_model_files(engine.files, "main")
    return {name: array for name, array in weights.items() if array.dtype.kind not in "iub" and array.size >= LARGE}


def model_of(engine: TrtEngine) -> onnx.ModelProto:
    """Return the emitted model of graph ``main``, without its weights."""
    return onnx.load_from_string(engine.files[graph_file("main", MODEL_FILE)].read())
