"""The table of the engines that run adapters: the LoRAs that each takes, with the files of it that say so.

An engine that ignores a field or a tensor computes something else without a word, so that its row lists what it ignores
as well as what it refuses. ``lorac.convert`` makes the LoRA that a row takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorac.errors import not_one_of
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import CONVOLUTION_KINDS, Site, SiteKind

_EMBEDDINGS = ("embed_tokens", "lm_head")
_LANGUAGE = ("model.language_model.", "language_model.")
"""Prefixes of the language model in a model that has other parts."""
_LINEAR = frozenset({SiteKind.LINEAR})
_WITH_TABLES = _LINEAR | {SiteKind.EMBEDDING}
_SWIGLU = ("gate_proj", "up_proj", "down_proj")
_SPECIAL = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
"""Fields of PEFT's that make a LoRA something else."""
_OTHER_SCALES = ("use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class ExpertNames:
    """The names of a mixture's experts in an engine, whose matrices are apart where the model fuses two of them.

    Attributes:
        module: the name of the module that holds them, after the path of its block.
        names: those of the gate's, the up and the down projection.
    """

    module: str = "mlp.experts"
    names: tuple[str, str, str] = _SWIGLU


@dataclass(frozen=True, kw_only=True)
class EngineRules:
    """The LoRAs that one engine takes.

    Attributes:
        version: the release whose rules these are.
        source: the files of that release that hold them.
        format: lorac's name of the format that it reads.
        usage: the command that runs a model with the file; {path} is the file's, {rank} its largest rank.
        refused: fields of PEFT's adapter_config.json that it refuses where they are set.
        ignored: fields that it does not read, though they change the result.
        kinds: kinds of sites.
        leaves: last names of the linear layers; None: any name.
        embeddings: last names of input and output embeddings, of any model, or by model_type ("" for all others).
        models: model_types that it serves adapters of; None: all but ``without``.
        without: model_types that it runs without adapters.
        heads: modules that a file may replace whole (``modules_to_save``).
        together: names of layers of which it takes all with one rank, or none.
        experts: model_type -> names of experts that lie apart in the file; "" for all other models.
        stacked: model_types of which the experts' factors are stacked, as in PEFT's files.
        biases: ``lora_bias``.
        ranks: the ranks that it reserves memory for, of which the last is the largest possible; () for any rank.
        uniform: all layers have one rank and one scale.
        dtypes: dtypes of tensors that it reads.
        renames: parts of names in the file -> as the engine has them.
    """

    version: str
    source: str
    format: str
    usage: str
    refused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kinds: frozenset[SiteKind] = _WITH_TABLES
    leaves: frozenset[str] | None = None
    embeddings: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": _EMBEDDINGS})
    models: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    heads: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    experts: Mapping[str, ExpertNames] = field(default_factory=dict)
    stacked: frozenset[str] = frozenset()
    biases: bool = False
    ranks: tuple[int, ...] = ()
    uniform: bool = False
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    renames: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, site: Site, view: ModelView) -> str | None:
        """Return what a site is that it takes no LoRA of, as the end of a sentence about it; None if it takes one."""
        model_type, leaf = find_model_type(view), site.path.rpartition(".")[2]
        if site.stack:
            apart = self.experts_of(model_type) is not None
            return None if apart or model_type in self.stacked else "a stack of experts"
        if site.kind not in self.kinds or site.within is not None:
            return f"a weight within '{site.within}'" if site.within else f"of kind {site.kind}"
        if leaf in _EMBEDDINGS or site.kind is SiteKind.EMBEDDING:
            taken = self.embeddings.get(model_type, self.embeddings.get("", ()))
            return None if leaf in taken else "an embedding or output layer"
        config: Any = getattr(view.module, "config", None)
        has_parts = hasattr(config, "get_text_config") and config.get_text_config() is not config
        if has_parts and not site.path.startswith(_LANGUAGE):
            return "outside the language model"
        return None if self.leaves is None or leaf in self.leaves else "a layer that it does not know by this name"

    def experts_of(self, model_type: str) -> ExpertNames | None:
        """Return the names of experts that lie apart in its files; None where they do not."""
        return None if model_type in self.stacked else self.experts.get(model_type, self.experts.get(""))

    def serves(self, model_type: str) -> bool:
        """Return whether it runs adapters on models of a type."""
        return model_type not in self.without and (self.models is None or model_type in self.models)


_VLLM_EMBEDDINGS = (
    "apertus ernie4_5 exaone exaone4 exaone_moe falcon_h1 granite granite_swa granitemoe granitemoe_swa "
    "granitemoehybrid granitemoeshared hyperclovax internlm3 iquestcoder jamba lfm2 lfm2_moe llama llama4 llama4_text "
    "minicpm3 mistral mixtral nemotron nemotron_h phi3 qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text "
    "qwen3_moe"
)
_VLLM_WITHOUT = (
    "arcee aria bloom clip cohere2_moe cohere2_vision cohere_asr cwm dbrx emu3 falcon falcon_mamba flex_olmo gemma3n "
    "gemma3n_text glm gpt-sw3 gpt2 gpt_bigcode gpt_neox gptj hunyuan_v1_dense hunyuan_v1_moe jais2 llava_onevision "
    "mamba mamba2 mimo_v2_flash modernvbert nomic_bert olmo olmo2 olmo3 paddleocr_vl phi qwen2_audio seed_oss siglip "
    "smollm3 stablelm starcoder2 vaultgemma zamba2"
)
_VLLM_STACKED = "gpt_oss qwen3_5_moe qwen3_5_moe_text qwen3_omni_moe qwen3_vl_moe interns1_pro"
_SGLANG_LEAVES = (
    "q_proj k_proj v_proj qkv_proj o_proj out_proj gate_proj up_proj gate_up_proj down_proj q_a_proj "
    "kv_a_proj_with_mqa q_b_proj kv_b_proj in_proj in_proj_qkvz"
)
_QKV, _GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_GGUF = "convert_lora_to_gguf.py, src/llama-adapter.cpp and src/llama-graph.cpp (build_lora_mm)"

ENGINES: Mapping[str, EngineRules] = {
    "vllm": EngineRules(
        version="vLLM 0.33.0",
        source="vllm/lora/peft_helper.py, utils.py, lora_model.py, model_manager.py; models/* (SupportsLoRA)",
        format="peft",
        usage="vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME={path}",
        refused=("use_dora", "lora_bias", "bias", "modules_to_save", "init_lora_weights", *_SPECIAL),
        ignored=("trainable_token_indices",),
        embeddings=dict.fromkeys(_VLLM_EMBEDDINGS.split(), _EMBEDDINGS)
        | dict.fromkeys(("cohere", "cohere2"), _EMBEDDINGS[:1])
        | {"": ()},
        without=frozenset(_VLLM_WITHOUT.split()),
        heads=("classifier", "score"),
        experts={"mixtral": ExpertNames("block_sparse_moe.experts", ("w1", "w3", "w2")), "": ExpertNames()},
        stacked=frozenset(_VLLM_STACKED.split()),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    "sglang": EngineRules(
        version="SGLang 0.5.23",
        source="sglang/srt/lora/lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py",
        format="peft",
        usage="python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME={path}",
        refused=("use_dora",),
        ignored=(*_OTHER_SCALES, *_SPECIAL, "lora_bias", "bias", "modules_to_save", "trainable_token_indices"),
        leaves=frozenset(_SGLANG_LEAVES.split()),
        together=(_QKV, _GATED),
        experts={"": ExpertNames()},
        uniform=True,
    ),
    "llama.cpp": EngineRules(
        version="llama.cpp of xllamacpp 2026.10.11549",
        source=_GGUF,
        format="gguf",
        usage="llama-server -m BASE.gguf --lora {path}",
        refused=("use_dora", "lora_bias", "modules_to_save"),
        ignored=_OTHER_SCALES,
    ),
    "ollama": EngineRules(
        version="ollama of 21 August 2026",
        source="convert/convert.go, llm/llama_server.go (--lora), docs/modelfile.mdx",
        format="gguf",
        usage="printf 'FROM BASE\\nADAPTER {path}\\n' > Modelfile && ollama create NAME",
        ignored=_OTHER_SCALES,
    ),
    "genai": EngineRules(
        version="onnxruntime-genai 0.18.0",
        source="models/builders/base.py (make_matmul_lora) with Olive's passes/onnx/extract_adapters.py",
        format="onnx_adapter",
        usage="adapters.load('{path}', NAME); generator.set_active_adapter(adapters, NAME)",
        kinds=_LINEAR,
        embeddings={"": ("lm_head",)},
        dtypes=("float32", "float16"),
        renames={".self_attn.": ".attn.", ".lora_A.": ".lora_A.MatMul.", ".lora_B.": ".lora_B.MatMul."},
    ),
    "diffusers": EngineRules(
        version="diffusers 0.42.1",
        source="loaders/peft.py, utils/peft_utils.py",
        format="diffusers",
        usage="pipeline.load_lora_weights('{path}')",
        kinds=_LINEAR | frozenset(CONVOLUTION_KINDS.values()),
        biases=True,
    ),
    "mlx": EngineRules(
        version="mlx-lm 0.32.2",
        source="mlx_lm/tuner/utils.py (load_adapters), tuner/lora.py",
        format="mlx",
        usage="mlx_lm.generate --model BASE --adapter-path {path} --prompt …",
        uniform=True,
    ),
    "olive": EngineRules(
        version="Olive 0.13.0",
        source="olive/cli/convert_adapters.py, olive/passes/onnx/extract_adapters.py",
        format="peft",
        usage="olive convert-adapters -a {path} -o NAME.onnx_adapter",
        refused=("use_dora",),
        ignored=(*_OTHER_SCALES[1:], *_SPECIAL, "lora_bias", "bias", "modules_to_save", "trainable_token_indices"),
        kinds=_LINEAR,
        embeddings={"": ("lm_head",)},
        uniform=True,
    ),
}
"""Name in ``lorac convert --for`` -> its rules."""


def find_engine(name: str) -> EngineRules:
    """Return the rules of an engine.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in ENGINES:
        raise not_one_of("there is no engine", name, ENGINES)
    return ENGINES[name]


def find_model_type(view: ModelView) -> str:
    """Return the model_type of transformers' configuration of the language model; "" without one."""
    config: Any = getattr(view.module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return str(getattr(config, "model_type", ""))
