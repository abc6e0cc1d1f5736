"""The PEFT checkpoints of the end-to-end tests: model, configuration, and the outputs that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig
from torch import Tensor, nn

from tests import parity
from tests.peft_files import make_peft, quiet
from tests.zoo import ZOO

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A checkpoint of one configuration for one model of the zoo.

    Attributes:
        name: what is special about it.
        model: name in the zoo.
        config: the PEFT configuration.
        change: done to a copy of the model first (ties, say); None takes it as it is.
        modes: the modes it runs in.
        outputs: the outputs that it moves by 5 to 50 %, if not those of the zoo.
        dtype: of the model and the file in eager.
        back: what lorac saves of it, PEFT loads.
        alone: it can be read and written without its model, too.
        emitted: it runs in ONNX Runtime, too.
        late: it takes long, and is in the long run.
    """

    name: str
    model: str
    config: PeftConfig
    change: Callable[[nn.Module], None] | None = None
    modes: tuple[str, ...] = ("live", "fused", "baked")
    outputs: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    back: bool = True
    alone: bool = True
    emitted: bool = False
    late: bool = False

    @property
    def id(self) -> str:
        return f"{self.model}-{self.name}"

    @property
    def kind(self) -> str:
        """The PEFT type."""
        return str(self.config.peft_type.value)

    def host(self, dtype: torch.dtype) -> nn.Module:
        """The base, a copy of its own."""
        model = ZOO[self.model].fresh(dtype)
        if dtype == torch.float64:
            compute_norms_in_float64(model)
        if self.change is not None:
            self.change(model)
        return model

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the outputs to compare."""
        return self.outputs or ZOO[self.model].outputs


def compute_norms_in_float64(model: nn.Module) -> None:
    """Put torch's RMSNorm in the place of transformers', which rounds to float32 whatever it is given.

    Two computations that differ by 1e-16 may be rounded to different float32 numbers there, 6e-8 apart: on SmolLM2's
    61 norms that happens, and then nothing below 1e-7 can be decided.
    """
    for path, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            weight: Any = module.weight
            norm = nn.RMSNorm(weight.shape[0], eps=module.variance_epsilon, dtype=weight.dtype)  # type: ignore[arg-type]
            norm.weight = weight
            model.set_submodule(path, norm)


def tie(model: nn.Module) -> None:
    """Make the output layer share the input embedding's weight."""
    model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    model.tie_weights()  # type: ignore[operator]


def build(config: type[PeftConfig], name: str, model: str, /, **settings: Any) -> Case:
    """A case of a configuration; settings that are attributes of `Case` are the case's."""
    own = {field.name: settings.pop(field.name) for field in fields(Case) if field.name in settings}
    with quiet():
        return Case(name, model, config(**settings), **own)


def _lora(name: str, model: str, targets: Any = None, /, **settings: Any) -> Case:
    fixed = {"r": 3, "lora_alpha": 5, "target_modules": targets or list(ZOO[model].targets)}
    return build(LoraConfig, name, model, **{**fixed, **settings})


def _shira(name: str, model: str, targets: Any, /, **settings: Any) -> Case:
    return build(ShiraConfig, name, model, **{"r": 3, "target_modules": targets, "random_seed": 7, **settings})


PLAIN = ("plain_mlp", "plain_conv", "resnet18")
TEXT = ("tiny_llama", "tiny_bert", "tiny_gpt2", "tiny_albert", "tiny_t5")
_SPARED = {"plain_conv": ["stem", "line", "head"]}  # grouped convolutions have a case of their own


def _everywhere() -> list[Case]:
    """LoRA and DoRA on the usual targets of every model, ranks and scales by pattern."""
    cases = []
    for model in (*PLAIN, *TEXT, "tiny_vit"):
        targets = _SPARED.get(model, list(ZOO[model].targets))
        patterns = {"rank_pattern": {targets[0]: 2, targets[-1]: 5}, "alpha_pattern": {targets[-1]: 2}}
        cases += [
            _lora("lora", model, targets, r=1, bias="lora_only", **patterns),
            _lora("rslora", model, targets, use_rslora=True, **patterns),
            _lora("dora", model, targets, use_dora=True, **patterns),
        ]
    return cases


CASES: tuple[Case, ...] = (
    *_everywhere(),
    # embeddings, biases, saved modules
    _lora("dora_embedding", "plain_mlp", ["embed", "head"], use_dora=True),
    _lora("bias_all", "plain_mlp", ["up"], bias="all"),
    _lora("lora_bias", "plain_mlp", ["up", "head"], lora_bias=True),
    _lora("lora_bias", "plain_conv", ["stem", "line", "head"], lora_bias=True),
    _lora("saved", "plain_mlp", ["up"], modules_to_save=["embed", "head"]),
    _lora("grouped", "plain_conv", ["stem", "grouped"], r=4, modes=("live",)),
    _lora("bias_all", "plain_conv", ["stem", "grouped"], r=4, bias="all", modes=("live",)),
    _lora("saved_norms", "resnet18", ["layer1.0.conv1", "layer3.1.conv2", "fc"], modules_to_save=["bn1"]),
    _lora("saved_head", "resnet18", ["downsample.0", "conv2"], modules_to_save=["fc"], use_dora=True),
    _lora("all_linear", "tiny_llama", "all-linear"),
    _lora("all_linear", "tiny_vit", "all-linear"),
    _lora("layers", "tiny_llama", ["q_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    _lora("exclude", "tiny_llama", ["q_proj", "v_proj", "up_proj"], exclude_modules=r".*\.1\..*"),
    _lora("regex", "tiny_llama", r".*layers\.[02]\.(self_attn\.[qk]_proj|mlp\.gate_proj)"),
    _lora("embeddings", "tiny_llama", ["embed_tokens", "lm_head", "q_proj"]),
    _lora("saved_norms", "tiny_llama", ["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    _lora("saved_embeddings", "tiny_llama", ["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    _lora("tied_embedding", "tiny_llama", ["embed_tokens", "v_proj"], change=tie),
    _lora("tied_lm_head", "tiny_llama", ["lm_head", "v_proj"], change=tie),
    _lora("tied_both", "tiny_llama", ["embed_tokens", "v_proj"], ensure_weight_tying=True, change=tie),
    _lora(
        "tied_saved", "tiny_llama", ["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, change=tie
    ),
    _lora("saved_head", "tiny_bert", ["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    _lora("saved_norms", "tiny_bert", ["query"], modules_to_save=["LayerNorm", "pooler.dense"]),
    _lora("bias_all", "tiny_bert", ["query"], bias="all"),
    _lora("lora_bias", "tiny_bert", ["query", "dense"], lora_bias=True),
    _lora("embeddings", "tiny_bert", ["word_embeddings", "position_embeddings", "value"], use_dora=True),
    _lora("lora_only", "tiny_gpt2", ["c_attn", "c_fc"], bias="lora_only", fan_in_fan_out=True),
    _lora("dora_all_bias", "tiny_gpt2", ["c_attn", "c_proj"], bias="all", use_dora=True, fan_in_fan_out=True),
    _lora("lora_bias", "tiny_gpt2", ["c_attn", "mlp.c_proj"], lora_bias=True),
    _lora("tied", "tiny_gpt2", ["wte", "c_attn"]),
    _lora("lm_head", "tiny_gpt2", ["lm_head", "c_attn"], use_dora=True),
    _lora("saved_norms", "tiny_gpt2", ["c_attn"], modules_to_save=["ln_f", "wpe"]),
    _lora("saved_head", "tiny_vit", ["q_proj"], modules_to_save=["classifier", "layernorm"]),
    _lora("patches", "tiny_vit", ["projection", "fc1"], use_dora=True),
    _lora("bias_all", "tiny_vit", ["v_proj", "fc2"], bias="all"),
    _lora("bias_all", "tiny_t5", ["q"], bias="all"),
    _lora("saved_norms", "tiny_t5", ["q", "v"], modules_to_save=["final_layer_norm"]),
    _lora("shared", "tiny_t5", ["shared", "q"]),
    _lora("relative", "tiny_t5", ["relative_attention_bias", "v"], use_dora=True),
    _lora("saved_shared", "tiny_t5", ["q", "v"], modules_to_save=["shared"]),
    _lora("saved_head", "tiny_albert", ["query", "ffn"], modules_to_save=["classifier", "LayerNorm"]),
    _lora("bias_all", "tiny_albert", ["query"], bias="all"),
    _shira("shira", "plain_mlp", ["up", "head"]),
    _shira("shira", "tiny_llama", ["q_proj", "down_proj"], r=1),
    _shira("shira", "tiny_bert", ["query", "value"]),
    _shira("shira", "tiny_albert", ["query", "ffn"]),
    _shira("shira", "tiny_vit", ["q_proj", "fc1"]),
    _shira("shira", "tiny_t5", ["q", "wo"]),
)


def checkpoint(case: Case, folder: Path, base: torch.dtype, **settings: Any) -> tuple[nn.Module, PeftModel]:
    """The case's base in a dtype, and PEFT's model of the checkpoint that it writes into ``folder``."""
    model = case.host(base)
    return model, _written(case, folder, model, base, **settings)


def checkpoints(cases: Sequence[Case], folder: Path, base: torch.dtype) -> tuple[nn.Module, dict[str, PeftModel]]:
    """One base of several cases in a dtype, and by name PEFT's models of what it writes into a folder for each."""
    model = cases[0].host(base)
    return model, {case.name: _written(case, folder / case.name, model, base) for case in cases}


def _written(case: Case, folder: Path, model: nn.Module, base: torch.dtype, **settings: Any) -> PeftModel:
    inputs = ZOO[case.model].inputs(dtype=base)
    return make_peft(
        model, folder, case.config, inputs=inputs, outputs=case.compared, **{"contribution": 0.15, **settings}
    )


def shapes(name: str, dtype: torch.dtype) -> list[Inputs]:
    """Calls of a model of the zoo: as in the example, one row of length one, and larger."""
    entry = ZOO[name]
    return [entry.inputs(seed=b, batch=b, length=n, dtype=dtype) for b, n in ((2, 5), (1, 1), (3, 9))]


def joined(outputs: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
    """The answers to several calls as one vector per output: the measure of all of them together.

    A call of one token may by itself move an output by more or less than decides anything.
    """
    found = [parity.named_outputs(output, names) for output in outputs]
    dtype = next(value.dtype for value in leaves(outputs[0]) if value.is_floating_point())
    return {name: torch.cat([output[name].flatten() for output in found]).to(dtype) for name in names}


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a model's answer."""
    values = [output] if isinstance(output, Tensor | np.ndarray) else output.values()
    return [torch.as_tensor(value) for value in values if isinstance(value, Tensor | np.ndarray)]


def example(name: str) -> dict[str, Any]:
    """What to tell ``compile`` of the inputs where lorac cannot make them."""
    if name not in PLAIN:
        return {}
    inputs = ZOO[name].inputs()
    free = {axis: torch.export.Dim.DYNAMIC for axis in ((0, 1) if name == "plain_mlp" else (0,))}
    return {"example_inputs": inputs, "dynamic_shapes": {key: free for key in inputs}}
