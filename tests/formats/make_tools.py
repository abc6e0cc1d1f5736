"""Make ``tests/formats/tools``: a tiny model, adapters that mlx-lm saved, one that llama.cpp reads, and their answers.

The tools lie in a folder of their own:

    pip install --no-deps --target TOOLS mlx mlx-cpu mlx-lm xllamacpp
    PYTHONPATH=.:TOOLS python tests/formats/make_tools.py

mlx-lm's adapters are its own files. llama.cpp's converter is not on PyPI, so that its adapter is lorac's, and the base
beside it is written here as the converter writes it, with the rows of queries and keys in llama.cpp's order.
"""

import json
import shutil
import tempfile
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import torch
import transformers
import xllamacpp
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from safetensors.torch import save_file

import lorac

HERE = Path(__file__).parent / "tools"
VOCABULARY, IDS = 40, [5, 9, 33, 7, 21, 12]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
PARAMETERS = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
EMBEDDING = {**PARAMETERS, "keys": [*PARAMETERS["keys"], "model.embed_tokens"]}
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"]


def make_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=64, initializer_range=0.15)
    return transformers.LlamaForCausalLM(config).eval()


# ── mlx-lm ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def in_mlx(model: torch.nn.Module) -> llama.Model:
    eps = model.config.rms_norm_eps
    made = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=eps, rope_theta=10000.0, **SIZES))
    made.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in model.state_dict().items()])
    return made


def answer_of_mlx(model: llama.Model) -> torch.Tensor:
    return torch.log_softmax(torch.tensor(np.array(model(mx.array([IDS]))))[0, -1], -1)


def train_in_mlx(model: llama.Model, kind: str, folder: Path) -> None:
    parameters = EMBEDDING if kind == "lora" else PARAMETERS
    model.freeze()
    if kind == "full":
        model.layers[-1].unfreeze()
    else:
        linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    mx.random.seed(1)
    moved = {
        name: value + 0.25 * mx.random.normal(value.shape) for name, value in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), moved)
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters, "model": "tiny", "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_base(model: transformers.PreTrainedModel, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(VOCABULARY - 3))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for leaf, count in heads.items():
            if leaf in name:
                split = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer_of_llama_cpp(base: Path, adapter: Path | None) -> torch.Tensor:
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = str(base), 64, 1, False
    # Values are f16 otherwise, and the answers with them.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {"prompt": IDS, "n_predict": 1, "n_probs": VOCABULARY, "temperature": -1, "ignore_eos": True}
    found = xllamacpp.Server(parameters).handle_completions(request)
    found = json.loads(found) if isinstance(found, str) else found
    answer = torch.full((VOCABULARY,), torch.nan)
    for entry in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        answer[entry["id"]] = entry["logprob"]
    return answer


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    model = make_model()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, HERE / "model.safetensors")
    model.config.save_pretrained(HERE)
    answers = {"base": torch.log_softmax(model(torch.tensor([IDS])).logits[0, -1].detach(), -1)}
    for kind in ("lora", "dora", "full"):
        trained = in_mlx(model)
        train_in_mlx(trained, kind, HERE / f"mlx_{kind}")
        answers[f"mlx_{kind}"] = answer_of_mlx(load_adapters(in_mlx(model), str(HERE / f"mlx_{kind}")))
    adapter = lorac.compile(model, {"a": lorac.LoRA(r=3, alpha=7, targets=TARGETS)}).adapters["a"]
    generator = torch.Generator().manual_seed(2)
    for tensors in adapter.tensors.values():
        for tensor in tensors.values():
            tensor.data.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
    lorac.save_adapter(adapter, HERE / "llama_cpp.gguf", "gguf", model)
    with tempfile.TemporaryDirectory() as folder:
        write_base(model, Path(folder) / "base.gguf")
        answers["llama_cpp_base"] = answer_of_llama_cpp(Path(folder) / "base.gguf", None)
        answers["llama_cpp"] = answer_of_llama_cpp(Path(folder) / "base.gguf", HERE / "llama_cpp.gguf")
    save_file(answers, HERE / "answers.safetensors")
    print({name: float((answer - answers["base"]).abs().max()) for name, answer in answers.items()})


if __name__ == "__main__":
    main()
