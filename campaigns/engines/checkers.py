"""Engines' own code on a converted adapter: it is loaded from the packages that are installed, or unpacked in a folder.

vLLM, SGLang and Olive do not run without a GPU or their other dependencies, and their loaders do: a few of their files
are imported by path, over stand-ins for the modules that these name. What a loader reads is then multiplied out as the
engine's layers do, into a copy of the model. mlx-lm, llama.cpp, onnxruntime-genai and diffusers run the model
themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WHEELS = "LORAC_WHEELS"
"""Variable with a folder in which wheels of engines are unpacked, for those that are not installed."""


_LOADERS = {"vllm": "lora/peft_helper.py", "sglang": "srt/lora/lora.py", "olive": "cli/convert_adapters.py"}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Refusal(Exception):
    """The engine refuses the file, or would leave out a part of it."""


def find_package(name: str) -> Path | None:
    """Return the folder of an engine's package, installed or unpacked."""
    for root in filter(None, (os.environ.get(WHEELS), *sys.path)):
        for folder in (Path(root) / name, Path(root) / name / name):
            if (folder / _LOADERS[name]).is_file():
                return folder
    return None


# ── Loading a file over stand-ins ─────────────────────────────────────────────────────────────────────────────────────
class _Anything:
    """A name that a file imports and does not use here."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __call__(self, *_: object, **__: object) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases: object) -> tuple[type, ...]:
        return (object,)


def _stub(name: str, **values: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(values, __path__=[])
    return module


@contextlib.contextmanager
def _standing_in(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules |= modules
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _load(name: str, path: Path, stubs: Mapping[str, types.ModuleType]) -> types.ModuleType:
    parents = {name.rsplit(".", depth)[0]: _stub(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)}
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with _standing_in({**parents, **stubs, name: module}):
        spec.loader.exec_module(module)
    return module


def _load_functions(path: Path, wanted: set[str], **names: object) -> dict[str, Any]:
    """Return functions of a file whose imports are not to be had."""
    import ast

    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    space: dict[str, Any] = dict(names)
    exec(compile("from __future__ import annotations", str(path), "exec"), space)
    exec(compile(ast.Module(body, []), str(path), "exec", flags=annotations_flag()), space)
    return space


def annotations_flag() -> int:
    """Return the compiler's flag that leaves annotations unevaluated."""
    import __future__

    return __future__.annotations.compiler_flag


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
VLLM_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""packed_modules_mapping of Llama and its kin (models/llama.py)."""


def _vllm_modules(model: nn.Module, *, embeddings: bool) -> set[str]:
    """Return what WorkerLoRAManager._load_adapter expects: last names of layers, with those of packed ones apart."""
    leaves = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaves -= {"lm_head", "embed_tokens"}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            leaves |= {"experts"}
            count = next(iter(module.parameters())).shape[0]
            leaves |= {f"experts.{number}.{name}" for number in range(count) for name in _PROJECTIONS}
    return leaves | ({"embed_tokens", "lm_head"} if embeddings else set())


def read_vllm(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return what vLLM's own loader reads, as weight of the model -> ΔW in its layout, or -> the weight itself.

    Raises:
        Refusal: in vLLM's words.
    """
    root = find_package("vllm")
    assert root is not None
    logger = types.SimpleNamespace(info_once=lambda *_: None, info=lambda *_: None)
    stubs = {
        "vllm.config": _stub("vllm.config"),
        "vllm.config.lora": _stub("vllm.config.lora", LoRAConfig=_Anything),
        "vllm.logger": _stub("vllm.logger", init_logger=lambda _: logger),
        "vllm.utils": _stub("vllm.utils"),
        "vllm.utils.torch_utils": _stub("vllm.utils.torch_utils", PIN_MEMORY=False),
        "vllm.model_executor": _stub("vllm.model_executor"),
        "vllm.model_executor.models": _stub("vllm.model_executor.models"),
        "vllm.model_executor.models.utils": _stub("vllm.model_executor.models.utils", WeightsMapper=_Anything),
    }
    lora = root / "lora"
    helper = _load("vllm.lora.peft_helper", lora / "peft_helper.py", stubs)
    wanted = ("parse_fine_tuned_lora_name", "is_base_embedding_weights", "get_lora_id")
    names = _load_functions(lora / "utils.py", set(wanted))
    names["_GLOBAL_LORA_ID"] = 0
    stubs |= {
        "vllm.lora.peft_helper": helper,
        "vllm.lora.utils": _stub(
            "vllm.lora.utils",
            **{n: names[n] for n in ("parse_fine_tuned_lora_name", "is_base_embedding_weights", "get_lora_id")},
        ),
    }
    stubs["vllm.lora.lora_weights"] = _load("vllm.lora.lora_weights", lora / "lora_weights.py", stubs)
    loader = _load("vllm.lora.lora_model", lora / "lora_model.py", stubs)
    config: Any = model.config
    try:
        peft = helper.PEFTHelper.from_local_dir(str(folder), None)
        peft.validate_legal(types.SimpleNamespace(max_lora_rank=512))
        found = loader.LoRAModel.from_local_checkpoint(
            str(folder),
            _vllm_modules(model, embeddings=config.model_type in {"llama", "qwen3", "qwen3_moe", "mixtral"}),
            peft,
            device="cpu",
            dtype=torch.float32,
            model_vocab_size=config.vocab_size,
        )
    except (ValueError, RuntimeError) as error:
        raise Refusal(str(error)) from error
    deltas = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, one in found.loras.items():
        if one.lora_a is None or one.lora_b is None:
            raise Refusal(f"'{path}' has one factor")
        deltas[path] = one.scaling * (one.lora_b @ one.lora_a)
    gathered = _gather_experts(deltas, parameters)
    whole = {
        f"={name}.{part}": value
        for name, one in found.modules_to_save.items()
        for part, value in (("weight", one.weight), ("bias", one.bias))
        if value is not None
    }
    return _as_weights(gathered, model) | whole


def _gather_experts(deltas: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return changes with those of experts stacked as the model has them."""
    rest, experts = {}, {}
    for path, delta in deltas.items():
        owner, mark, tail = path.rpartition(".experts.")
        if not mark:
            rest[path] = delta
            continue
        number, name = tail.split(".")
        experts[f"{owner}.experts", int(number), name] = delta
    for owner in {key[0] for key in experts}:
        count = 1 + max(number for path, number, _ in experts if path == owner)
        every = {(n, name) for n in range(count) for name in _PROJECTIONS}
        if {(n, name) for path, n, name in experts if path == owner} != every:
            raise Refusal(f"'{owner}' lacks projections of experts")
        stacked = [torch.stack([experts[owner, n, name] for n in range(count)]) for name in _PROJECTIONS]
        gate, up, down = stacked
        rest |= {f"{owner}.gate_up_proj": torch.cat([gate, up], 1), f"{owner}.down_proj": down}
    return rest


def _as_weights(deltas: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    found, parameters = {}, dict(model.named_parameters(remove_duplicate=False))
    for path, delta in deltas.items():
        name = path if path in parameters else f"{path}.weight"
        if name not in parameters:
            raise Refusal(f"there is no '{path}'")
        found[name] = delta if delta.shape == parameters[name].shape else delta.mT
        if found[name].shape != parameters[name].shape:
            raise Refusal(f"'{path}' is {tuple(delta.shape)}")
    return found


# ── SGLang ───────────────────────────────────────────────────────────────────────────────────────────────────────────
_SLICES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def read_sglang(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return what SGLang's own loader reads, as ``read_vllm``, by the shapes that its memory pool asserts.

    Raises:
        Refusal: in SGLang's words, or where it would leave out a tensor with a line in the log.
    """
    root = find_package("sglang")
    assert root is not None
    utils = root / "srt" / "lora" / "utils.py"
    wanted = ("get_normalized_target_modules", "get_target_module_name", "get_stacked_multiply")
    names = _load_functions(
        utils,
        set(wanted),
        Set=set,
        Iterable=list,
        Optional=Any,
        torch=torch,
    )
    common = _load_functions(_layers_utils(root), {"get_layer_id"}, re=__import__("re"))
    lora = root / "srt" / "lora"
    stubs = {
        "sglang.srt.configs": _stub("sglang.srt.configs"),
        "sglang.srt.configs.load_config": _stub("_", LoadConfig=_Anything),
        "sglang.srt.layers": _stub("sglang.srt.layers"),
        "sglang.srt.layers.utils": _stub("_", get_layer_id=common["get_layer_id"]),
        "sglang.srt.lora.backend": _stub("sglang.srt.lora.backend"),
        "sglang.srt.lora.backend.base_backend": _stub("_", BaseLoRABackend=_Anything),
        "sglang.srt.model_loader": _stub("sglang.srt.model_loader"),
        "sglang.srt.model_loader.loader": _stub("_", DefaultModelLoader=_Anything),
        "sglang.srt.utils": _stub("sglang.srt.utils"),
        "sglang.srt.utils.hf_transformers_utils": _stub("_", AutoConfig=_Anything),
        "sglang.srt.lora.utils": _stub(
            "_",
            **{
                n: names[n] for n in ("get_normalized_target_modules", "get_target_module_name", "get_stacked_multiply")
            },
        ),
    }
    stubs["sglang.srt.lora.lora_config"] = _load("sglang.srt.lora.lora_config", lora / "lora_config.py", stubs)
    loader = _load("sglang.srt.lora.lora", lora / "lora.py", stubs)
    base: Any = model.config
    config = stubs["sglang.srt.lora.lora_config"].LoRAConfig(str(folder), base_vocab_size=base.vocab_size)
    if config.use_dora:
        raise Refusal("LoRA serving currently doesn't support DoRA adapters")
    tensors = load_file(folder / "adapter_model.safetensors")
    loader_stubs = {"sglang.srt.lora.utils": stubs["sglang.srt.lora.utils"]}
    packages = {name: _stub(name) for name in ("sglang", "sglang.srt", "sglang.srt.lora")}
    with _standing_in({**packages, **loader_stubs}):
        adapter = loader.LoRAAdapter("one", config, model.config, None, None)
        try:
            adapter.initialize_weights_from_tensors(dict(tensors))
        except (KeyError, RuntimeError, AssertionError) as error:
            raise Refusal(f"{type(error).__name__}: {error}") from error
    targets = names["get_normalized_target_modules"](config.target_modules)
    known = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head", "out_proj"}
    taken = {name for layer in adapter.layers for name in layer.weights} | set(adapter.embedding_layers)
    stored = sum("layers." not in name and name not in adapter.embedding_layers for name in tensors)
    if stored:
        raise Refusal(f"{stored} tensors are left out")
    deltas: dict[str, Tensor] = {}
    for name in taken:
        try:
            target = names["get_target_module_name"](name, targets & known)
        except ValueError as error:
            raise Refusal(f"skipped: {error}") from error
        if ".lora_A." not in name and not name.endswith("lora_embedding_A"):
            if ".lora_B." not in name and not name.endswith("lora_embedding_B"):
                raise Refusal(f"'{name}' overwrites lora_B")
            continue
        _add_sglang(name, target, adapter, config, deltas, model)
    return _as_weights(_gather_experts(deltas, {}), model)


def _add_sglang(name: str, target: str, adapter: Any, config: Any, deltas: dict[str, Tensor], model: nn.Module) -> None:
    weights = {
        key: value for layer in adapter.layers for key, value in layer.weights.items()
    } | adapter.embedding_layers
    a = weights[name]
    b = weights[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
    path = name.removeprefix("base_model.model.").partition(".lora_")[0]
    parts = _SLICES.get(target, (target,))
    if a.shape[0] != len(parts) * config.r or b.shape[1] != config.r:
        raise Refusal(f"LoRA buffer shape does not match weight shape {tuple(a.shape)} of '{name}'")
    owner = path.rpartition(".")[0]
    rows = []
    for part in parts:
        module: Any = model
        with contextlib.suppress(AttributeError):
            module = model.get_submodule(f"{owner}.{part}")
        rows.append(module.weight.shape[0] if module is not model else b.shape[0] // len(parts))
    if len(parts) == 1:
        deltas[path] = adapter.scaling * (b @ a)
        return
    for part, one, two in zip(parts, a.chunk(len(parts)), b.split(rows), strict=True):
        deltas[f"{owner}.{part}"] = adapter.scaling * (two @ one)


def _layers_utils(root: Path) -> Path:
    return root / "srt" / "layers" / "utils" / "common.py"


# ── Olive ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_olive(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return what ``olive convert-adapters`` writes, as ``read_vllm``.

    Raises:
        Refusal: in Olive's words.
    """
    root = find_package("olive")
    assert root is not None
    kept: dict[str, Any] = {}
    formats = types.SimpleNamespace(ONNX_ADAPTER="onnx_adapter")
    stubs = {
        "olive.cli.base": _stub("_", BaseOliveCLICommand=object, add_logging_options=None, add_telemetry_options=None),
        "olive.common": _stub("olive.common"),
        "olive.common.utils": _stub("_", WeightsFileFormat=formats, save_weights=lambda found, *_: kept.update(found)),
        "olive.telemetry": _stub("_", action=lambda function: function),
    }
    module = _load("olive.cli.convert_adapters", root / "cli" / "convert_adapters.py", stubs)
    command = object.__new__(module.ConvertAdaptersCommand)
    command.args = argparse.Namespace(
        adapter_path=str(folder),
        adapter_format="onnx_adapter",
        output_path="",
        dtype="float32",
        quantize_int4=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            command.run()
        except ValueError as error:
            raise Refusal(str(error)) from error
    deltas = {}
    for name, a in kept.items():
        if ".lora_A." not in name:
            if ".lora_B." not in name:
                raise Refusal(f"'{name}' has no input in the program")
            continue
        b = kept[name.replace(".lora_A.", ".lora_B.")]
        path = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
        deltas[path] = torch.from_numpy((a @ b).T.copy())
    return _as_weights(deltas, model)


def apply(found: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """Return a copy of a model with the changes that an engine reads; each layer has a weight of its own."""
    made: Any = copy.deepcopy(model)
    if made.config.tie_word_embeddings and hasattr(made, "lm_head"):
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
    parameters: dict[str, Tensor] = dict(made.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in found.items():
            if name.startswith("="):
                own = next(p for key, p in parameters.items() if key == name[1:] or key.endswith(f".{name[1:]}"))
                own.copy_(delta)
            else:
                parameters[name].add_(delta)
    adapted: nn.Module = made
    return adapted


READERS: Mapping[str, Callable[[Path, nn.Module], dict[str, Tensor]]] = {
    "vllm": read_vllm,
    "sglang": read_sglang,
    "olive": read_olive,
}


# ── Engines that run here ────────────────────────────────────────────────────────────────────────────────────────────
def run_mlx(path: Path, base: Path, ids: Tensor) -> Tensor:
    """Return logits (1, s, v) of mlx-lm with the adapter's folder.

    Raises:
        Refusal: in mlx-lm's words.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_adapters, load_model

    config = json.loads((base / "config.json").read_text())
    fields = {"rope_theta": 10000.0, "num_experts": config.get("num_local_experts") or config.get("num_experts")}
    model, _ = load_model(base, model_config=fields)
    try:
        load_adapters(model, str(path))
    except (ValueError, KeyError) as error:
        raise Refusal(str(error)) from error
    model.eval()
    return torch.from_numpy(np.array(model(mx.array(ids.tolist()))).astype("float32"))


def write_gguf(model: nn.Module, path: Path) -> None:
    """Write a Llama or Qwen3 as llama.cpp reads it."""
    import gguf

    config: Any = model.config
    name = {"llama": "llama", "qwen3": "qwen3"}[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(config.vocab_size - 3))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.detach()
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
        count = next((n for end, n in heads.items() if key.endswith(end)), None)
        if name == "llama" and count:
            value = value.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(table.get_name(key, (".weight", ".bias")), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_cpp(path: Path | None, base: Path, ids: Tensor) -> Tensor:
    """Return llama.cpp's log-probabilities (v,) of the token after ``ids`` (1, s), with an adapter's file.

    Raises:
        Refusal: it does not load.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = str(base), 64, 1, False
    # Values are f16 otherwise, and the answers with them.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if path is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0)]
    size = int(next(iter(read_gguf_vocabulary(base))))
    request = {"prompt": ids[0].tolist(), "n_predict": 1, "n_probs": size, "temperature": -1, "ignore_eos": True}
    try:
        found = xllamacpp.Server(parameters).handle_completions(request)
    except RuntimeError as error:
        raise Refusal(str(error)) from error
    found = json.loads(found) if isinstance(found, str) else found
    answer = torch.full((size,), torch.nan)
    for entry in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        answer[entry["id"]] = entry["logprob"]
    return answer


def read_gguf_vocabulary(base: Path) -> Iterator[int]:
    """Yield the size of a model's vocabulary."""
    import gguf

    yield len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)


@torch.no_grad()
def run_diffusers(path: Path, model: nn.Module, arguments: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of a model that diffusers' own loader gives an adapter's file; the model is only read.

    Raises:
        Refusal: in diffusers' words, or where it would leave out a layer.
    """
    made: Any = copy.deepcopy(model)
    prefix = "unet" if "UNet" in type(model).__name__ else "transformer"
    try:  # with the option with which pipelines call it, by which it reads the metadata too
        made.load_lora_adapter(str(path), prefix=prefix, use_safetensors=True)
    except (AttributeError, ValueError, RuntimeError) as error:
        raise Refusal(str(error)) from error
    given, loaded = (sum(".lora_A." in name for name in names) for names in (load_file(path), made.state_dict()))
    if given != loaded:
        raise Refusal(f"{loaded} of {given} layers are loaded")
    answer: Tensor = made(**arguments, return_dict=False)[0]
    return answer


class GenaiProgram:
    """A program of onnxruntime-genai's builder, whose adapter's tensors Olive's pass makes inputs."""

    def __init__(self, base: Path, adapter: Path, folder: Path) -> None:
        """Build it from a model's folder and a PEFT folder that names all layers that are to be adapted."""
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base), "-o", str(folder)]
        command += [
            "-p",
            "fp32",
            "-e",
            "cpu",
            "-c",
            str(folder / "cache"),
            "--extra_options",
            f"adapter_path={adapter}",
        ]
        subprocess.run(command, check=True, capture_output=True)
        self.folder = folder
        _make_inputs(folder / "model.onnx")

    def run(self, path: Path, ids: Tensor) -> Tensor:
        """Return logits (1, s, v) with an adapter's file.

        Raises:
            Refusal: in the words of ONNX Runtime.
        """
        import onnxruntime_genai as og

        model = og.Model(str(self.folder))
        adapters = og.Adapters(model)
        try:
            adapters.load(str(path), "one")
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=ids.shape[1] + 1, batch_size=1)
            generator = og.Generator(model, params)
            generator.set_active_adapter(adapters, "one")
            generator.append_tokens(ids[0].tolist())
            generator.generate_next_token()
        except Exception as error:  # its errors have no class of their own
            raise Refusal(str(error)) from error
        return torch.from_numpy(generator.get_output("logits"))


def _make_inputs(path: Path) -> None:
    """Make the adapter's initializers optional inputs of rank 0, as Olive's ExtractAdapters does."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    for one in [one for one in graph.initializer if ".lora_A." in one.name or ".lora_B." in one.name]:
        axis = 1 if ".lora_A." in one.name else 0
        shape: list[Any] = list(one.dims)
        shape[axis] = f"rank of {one.name.partition('.lora_')[0]}"
        graph.input.append(helper.make_tensor_value_info(one.name, one.data_type, shape))
        size = [0 if number == axis else value for number, value in enumerate(one.dims)]
        graph.initializer.remove(one)
        graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.float32), one.name))
    for one in [one for one in graph.value_info if "/lora_" in one.name]:  # their recorded rank is the builder's
        graph.value_info.remove(one)
    onnx.save(model, str(path), save_as_external_data=False)
