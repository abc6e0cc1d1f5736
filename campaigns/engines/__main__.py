"""Every method, on models of five families, for every engine: converted, and read or run by the engine's own code.

    python -m campaigns.engines run [--journal FILE] [--methods lora,dora] [--families llama] [--engines vllm] [--again]
    python -m campaigns.engines page > docs/engines.md

A run goes on where it stopped. $LORAC_WHEELS names a folder with the unpacked wheels of vLLM, SGLang and Olive; mlx-lm,
xllamacpp, onnxruntime-genai and diffusers are imported. An engine that is not to be had is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lorac
from campaigns import sound
from campaigns.engines import checkers
from campaigns.engines.contribution import contributing
from campaigns.zoo import journal
from lorac.formats.engines import ENGINES
from lorac.ir.sites.site import SiteKind
from lorac.variants.base import Variant

JOURNAL = journal.ROOT / "docs" / "engines.jsonl"
SIZES = {
    "vocab_size": 112,  # unlike the other sizes, by which genai's builder knows the output layer
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
TEXT = {**SIZES, "num_key_value_heads": 3, "max_position_embeddings": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}


def _unet() -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=3,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


FAMILIES: Mapping[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, head_dim=16)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **MOE)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=True)
    ),
    "unet": _unet,
}
TARGETS = {
    "llama": ["k_proj", "down_proj"],
    "qwen3": ["v_proj", "up_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "bert": ["query", "intermediate.dense"],
    "unet": ["to_v", "to_out.0"],
}
EMBEDDINGS = {"bert": ["word_embeddings"]}
NORMS = {"bert": ["LayerNorm"]}
CONVOLUTIONS = {"unet": ["conv1", "upsamplers.0.conv"]}
"""Further targets of the methods that adapt convolutions."""
IDS = torch.arange(3, 15)[None]
EXACT = 1e-4
"""The share of the adapter's effect up to which an answer is the same (float32), as in the tests."""
RUNS = {"mlx": "mlx_lm", "llama.cpp": "xllamacpp", "genai": "onnxruntime_genai", "diffusers": "diffusers"}


@functools.cache
def base(family: str) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    folder = Path(tempfile.mkdtemp(prefix="engines"))
    model.save_pretrained(folder / "hf")
    return model, folder


@functools.cache
def program(family: str) -> checkers.GenaiProgram:
    import peft

    model, folder = base(family)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "hf")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=every))
    made.save_pretrained(folder / "peft")
    return checkers.GenaiProgram(folder / "hf", folder / "peft", folder / "onnx")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1")


def arguments(family: str) -> dict[str, Tensor]:
    """Return the arguments of the call by which answers are compared."""
    if family != "unet":
        return {"input_ids": IDS}
    generator = torch.Generator().manual_seed(2)
    latents, states = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 48)))
    return {"sample": latents, "timestep": torch.tensor([400.0]), "encoder_hidden_states": states}


def answer(output: Any) -> Tensor:
    return output[0].detach()


@functools.lru_cache(1)
def adapted(family: str, key: str) -> tuple[lorac.Adapter, Tensor, Tensor]:
    """Return an adapter of a method that moves the output by about a fifth, with the base's output and its own."""
    variant, _ = sound.configured(key)
    return contributing(base(family)[0], fit(variant, family), lambda call: answer(call(**arguments(family))))


def fit(variant: Variant, family: str) -> Variant:
    """Return a method with targets in a family: those of its parts, unless it has its own."""
    parts = getattr(variant, "parts", ())
    kinds = frozenset.intersection(variant.kinds, *(part.kinds for part in parts if isinstance(part, Variant)))
    targets = TARGETS[family] + CONVOLUTIONS.get(family, []) * (SiteKind.CONV2D in kinds)
    if hasattr(variant, "token_indices"):
        targets = EMBEDDINGS.get(family, ["embed_tokens"])
    elif SiteKind.PARAMETER in kinds:
        targets = NORMS.get(family, ["norm"])
    if parts and not type(variant).targets:
        return dataclasses.replace(variant, **{"parts": tuple(fit(part, family) for part in parts)})
    return dataclasses.replace(variant, targets=targets)


def serve(engine: str, path: Path, family: str) -> tuple[Tensor, bool]:
    """Return an engine's answer with a file, and whether it is log-probabilities of the last token."""
    model, folder = base(family)
    if engine in checkers.READERS:
        with torch.no_grad():
            return answer(checkers.apply(checkers.READERS[engine](path, model), model)(IDS)), False
    if engine == "mlx":
        return checkers.run_mlx(path, folder / "hf", IDS), False
    if engine == "diffusers":
        return checkers.run_diffusers(path, model, arguments(family)), False
    if engine == "genai":
        return program(family).run(path, IDS), False
    gguf = folder / "base.gguf"
    if not gguf.exists():
        checkers.write_gguf(model, gguf)
    return checkers.run_llama_cpp(path, gguf, IDS), True


def own_rounding(engine: str, family: str, plain: Tensor) -> Tensor:
    """Return how far the engine's answer of the base is from torch's."""
    if engine == "llama.cpp":
        model, folder = base(family)
        if not (folder / "base.gguf").exists():
            checkers.write_gguf(model, folder / "base.gguf")
        found = checkers.run_llama_cpp(None, folder / "base.gguf", IDS)
        return found - torch.log_softmax(plain[0, -1], -1)
    return torch.zeros(1)


def runs(engine: str, family: str) -> bool:
    """Return whether an engine's code is to be had for a family."""
    if engine in checkers.READERS:
        return checkers.find_package(engine) is not None
    if importlib.util.find_spec(RUNS.get(engine, "absent")) is None:
        return False
    if engine == "diffusers":
        return family == "unet"
    return family in ("llama", "qwen3", *(["qwen3_moe"] if engine == "mlx" else []))


def check(family: str, key: str, engine: str) -> dict[str, Any]:
    """Return the outcome of one conversion."""
    model, _ = base(family)
    try:
        adapter, plain, given = adapted(family, key)
    except lorac.LoracError as error:
        return {"outcome": "no such layer", "why": type(error).__name__}
    except AssertionError as error:
        return {"outcome": "undecided", "why": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / (
            "out.gguf" if engine == "llama.cpp" else "out.onnx_adapter" if engine == "genai" else "out"
        )
        try:
            near = lorac.convert(adapter, for_=engine, model=model)
            made = lorac.convert(adapter, out, for_=engine, model=model, tolerance=0)
        except lorac.LoracError as error:
            return {"outcome": "refused", "why": str(error).splitlines()[0]}
        stated = max(near.provenance["errors"].values(), default=0.0)
        record = {"stated": round(stated, 4), "rank": max(at["lora_A"].shape[-2] for at in made.tensors.values())}
        if not runs(engine, family):
            return {"outcome": "written", **record}
        try:
            found, is_last = serve(engine, out, family)
        except checkers.Refusal as error:
            return {"outcome": "engine refuses", "why": str(error)[:300], **record}
    noise = own_rounding(engine, family, plain)
    if is_last:
        plain, given = (torch.log_softmax(y[0, -1], -1) for y in (plain, given))
        sure = ~(found.isnan() | noise.isnan())
        found, plain, given, noise = found[sure], plain[sure], given[sure], noise[sure]
    elif found.shape[1] < given.shape[1]:  # onnxruntime-genai computes the last logits alone
        plain, given = (y[:, -found.shape[1] :] for y in (plain, given))
    effect = torch.dist(plain, given)
    ratio = float(torch.dist(found, given) / effect)
    allowed = max(EXACT, 4 * float(noise.norm() / effect))
    return {"outcome": "equal" if ratio <= allowed else "differs", "ratio": ratio, "allowed": allowed, **record}


def run(path: Path, methods: list[str], families: list[str], engines: list[str], *, again: bool) -> None:
    done = {} if again else journal.read(path)
    for family in families:
        for key in methods:
            for engine in engines:
                if (family == "unet") != (engine == "diffusers"):
                    continue
                name = f"{family}/{key}/{engine}"
                if name in done:
                    continue
                with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                    warnings.simplefilter("ignore")
                    record = check(family, key, engine)
                journal.append(path, {"model": name, **record})
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in journal.read(path).values()))


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
INTRODUCTION = """# Engines

[Convert](convert.md#for-an-engine) says how `lorac convert --for ENGINE` is used.

## Rules

| engine | of | reads | layers | rank | replaced heads | refuses | ignores |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
READ = """
The rules were read in these files:

{sources}

## Every method

Tiny models of the families below, with adapters that move the output by about a fifth. *equal*: converted with
`--tolerance 0`, the engine's own code gives the adapter's answer within 1e-4 of its effect, or within four times the
engine's rounding on the base. The number is the largest error of a site at the default rank of 16, where that is not
exact. *written*: the engine's code does not run here on that family. *refused*: the engine has no place for the layer
or the change, which `lorac convert` names with the reason. *–*: the method adapts no layer that was targeted here.
The U-Net is for diffusers alone, which runs it.

vLLM, SGLang and Olive run as far as their loaders: what these read is multiplied out into the model. mlx-lm, llama.cpp
and onnxruntime-genai run the model. {absent}
"""
FOOT = """
*Made by `python -m campaigns.engines page` from lorac's table (`lorac/formats/engines.toml`), and from a run of every
method through the engines' own code.*
"""


def page(path: Path) -> str:
    rows = []
    for name, one in ENGINES.items():
        layers = ", ".join(one.kinds) if not one.leaves else "by name"
        rank = f"up to {one.ranks[-1]}" if one.ranks else "any"
        cells = (f"`{name}`", one.version, f"`{one.format}`", layers, rank + (", one for all" if one.uniform else ""))
        lists = (", ".join(f"`{field}`" for field in found) or "–" for found in (one.heads, one.refused, one.ignored))
        rows.append("| " + " | ".join((*cells, *lists)) + " |")
    sources = "\n".join(f"- {one.version}: `{one.source}`" for one in ENGINES.values())
    found = journal.read(path)
    engines = [name for name in ENGINES if any(key.endswith(f"/{name}") for key in found)]
    absent = [f"`{name}`" for name in ENGINES if name not in engines]
    absent_text = f"No file for {', '.join(absent)} was run." if absent else ""
    text = INTRODUCTION + "\n".join(rows) + "\n" + READ.format(sources=sources, absent=absent_text)
    for family in FAMILIES:
        methods = sorted({key.split("/")[1] for key in found if key.startswith(f"{family}/")})
        if not methods:
            continue
        columns = [name for name in engines if any(f"{family}/{key}/{name}" in found for key in methods)]
        text += f"\n### {family}\n\n| method | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}\n"
        for key in methods:
            cells = [_cell(found.get(f"{family}/{key}/{engine}")) for engine in columns]
            text += f"| `{key}` | {' | '.join(cells)} |\n"
    counts = Counter(record["outcome"] for record in found.values())
    return text + "\n" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + ".\n" + FOOT


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None or record["outcome"] == "no such layer":
        return "–"
    near = f", {record['stated']:g}" if record.get("stated", 0) > EXACT else ""
    return f"{record['outcome']}{near}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    parser.add_argument("--methods", default=",".join(lorac.variants()))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--again", action="store_true", help="run what the journal has, too")
    parser.add_argument("--engines", default="vllm,sglang,llama.cpp,genai,mlx,olive,diffusers")
    given = parser.parse_args()
    if given.what == "page":
        print(page(given.journal), end="")
        return
    run(given.journal, *(text.split(",") for text in (given.methods, given.families, given.engines)), again=given.again)


if __name__ == "__main__":
    main()
