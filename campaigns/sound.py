"""Sound files of every format, tiny, for campaigns to damage: adapters of all methods, and artifacts of all targets.

Configurations follow from the methods there are: from the conformance kit with the sizes of their oracles, and for
methods made of others from ``COMPOSED``. A method or a format without a sample is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import examples
import lorac
from lorac.errors import LoracError
from lorac.formats import formats
from lorac.ir.sites.site import SiteKind
from lorac.testing import samples
from lorac.testing.hosts import HOSTS
from lorac.testing.hosts import ConformanceHost as Host
from lorac.trainer import Recipe, checkpoints, read_recipe
from lorac.training import name_optimizer_state
from lorac.variants.base import Variant
from tests.decoders import DECODERS
from tests.runtime.generation.prompted import CAUSAL, CONFIGS, save_prompt
from tests.zoo import ZOO

INDEX = "sound.json"
COMPOSED: Mapping[str, Mapping[str, Any]] = {
    "adaption_prompt": {"num_attention_heads": 2},
    "chain": {"parts": (lorac.LoRA(r=2), lorac.BAT(r=2))},
    "decor": {"r": 2, "tokens": 16},
    "decor_weight": {"r": 2},
    "oft": {"r": 0, "block_size": 3},
    "prefix_tuning": {"num_virtual_tokens": 2, "num_layers": 1, "num_attention_heads": 1, "token_dim": 4},
    "residual": {"method": lorac.LoRA(r=2)},
    "split": {"parts": {"first": lorac.LoRA(r=2)}, "among": ("first", "second")},
    "trainable_tokens": {"token_indices": (1, 3)},
    "union": {"parts": (lorac.LoRA(r=2, targets=["site"]),)},
}
"""Fields of methods without an oracle of their own, and other ones than those of it."""
QUICK = ("lora", "shira", "vera", "chain")
CACHE = "cache"
"""In the place of a mode: a language model, live, that keeps a cache."""
ARTEFACTS = (
    ("eager", "live"), ("onnxruntime", "fused"), ("onnxruntime", "live"), ("eager", "fused"), ("onnxruntime", "baked"),
    ("tensorrt", "live"), ("openvino", "live"), ("openvino", "fused"), ("openvino", CACHE), ("onnxruntime", CACHE),
)  # fmt: skip
HUB = {
    "bottleneck": lorac.Bottleneck.preset("seq_bn"),
    "lora": lorac.LoRA(r=2, targets=["query", "value"]),
    "ia3": lorac.IA3(targets=["value"], feedforward=[]),
}
"""Methods that AdapterHub's files hold, on BERT."""
FORK = {"peft_type": "LORA", "r": 6, "lora_alpha": 9, "target_modules": ["site"], "init_lora_weights": "sparse"}
"""FlyLoRA's fork of PEFT, which lorac reads and does not write."""


OF_LYCORIS: Mapping[str, Mapping[str, Any]] = {
    "boft": {"block_size": 2, "rotates_output": True},
    "ia3": {"scales_bias": False},
}
"""Fields of methods by which they are LyCORIS's."""
TEXT = {"a": lorac.LoRA(r=2, targets=["q_proj", "down_proj"])}
"""The adapter of a language model's artifact."""
MERGED = "model/a.safetensors"
"""The adapter that is merged into models."""
PIPELINE = {"unet": "conv", "text_encoder": "two_linear"}
"""Component -> its host."""


@dataclass(frozen=True)
class Sound:
    """One file, or folder, that loads.

    Attributes:
        kind: the name of its format, "bin" for PEFT's with a pickle, or "artifact".
        what: its method, or its target and mode.
        place: where it lies, below the folder of all.
        host: the name of the host it is for.
    """

    kind: str
    what: str
    place: str
    host: str

    @property
    def is_refused(self) -> bool:
        """Whether reading it is refused as it is: the gates of a merger are no adapter without its LoRAs."""
        return self.kind == "autolora"

    def below(self, folder: Path) -> Sound:
        """Return the same file with its whole path."""
        return dataclasses.replace(self, place=str(folder / self.place))


class Two(nn.Module):
    """What artifacts are compiled from; its weights are large enough to lie beside an ONNX model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y (…, 24) from x (…, 24)."""
        return self.down(torch.tanh(self.up(x)))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # A bias of o_proj would be added twice, as in PEFT, so that a fresh prompt would not be the base.
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v))


KIT = {
    **HOSTS,
    "attention": Host("attention", SiteKind.LINEAR, lambda: nn.Sequential(_Attention()), (5, 8), path="0.o_proj"),
}
"""The hosts of the conformance kit, and one for methods at an attention's output."""


@functools.cache
def model(host: str) -> Any:
    """Return a host by name, in float32; several by their names in a pipeline."""
    if host == "pipeline":
        return {component: model(name) for component, name in PIPELINE.items()}
    if host in OWN:
        return OWN[host]()
    return ZOO[host].model() if host in ZOO else KIT[host].model(torch.float32)


def write(
    folder: Path,
    *,
    quick: bool = False,
    artifacts: bool = True,
    methods: Iterable[str] | None = None,
    target: str | None = None,
) -> None:
    """Write everything, or in a hurry what a few methods and targets give, and a list of it.

    Args:
        target: write the artifacts of this target alone.
    """
    keys, targets = (QUICK, ARTEFACTS[:2]) if quick else (lorac.variants(), ARTEFACTS)
    samples = (_training, _recipes) if quick else tuple(SAMPLES.values())
    if target is not None:
        keys, targets, samples = (), tuple(pair for pair in ARTEFACTS if pair[0] == target), ()
    found = [
        *write_methods(folder, keys if methods is None else methods),
        *_artifacts(folder, targets if artifacts else ()),
    ]
    found += [sound for sample in samples for sound in sample(folder)]
    (folder / INDEX).write_text(json.dumps([dataclasses.asdict(sound) for sound in found]))


def read(folder: Path) -> list[Sound]:
    """Return the list of what ``write`` wrote."""
    return [Sound(**entry) for entry in json.loads((folder / INDEX).read_text())]


# ── Methods ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_methods(folder: Path, keys: Iterable[str]) -> Iterator[Sound]:
    """Write adapters of methods in lorac's own format, and PEFT's where it has a type for them."""
    for key in keys:
        variant, host = configured(key)
        here = model(host.name)
        adapter = _begin(key, variant, here)
        lorac.save_adapter(adapter, folder / "native" / f"{key}.safetensors", "native", here)
        yield Sound("native", key, f"native/{key}.safetensors", host.name)
        try:
            lorac.save_adapter(adapter, folder / "peft" / key, "peft", here)
            lorac.load_adapter(folder / "peft" / key, here)
        except LoracError:  # PEFT has no such type, or not for this layer or model
            continue
        yield Sound("peft", key, f"peft/{key}", host.name)
        _pickled(folder / "peft" / key, folder / "bin" / key)
        yield Sound("bin", key, f"bin/{key}", host.name)


def _begin(key: str, variant: Variant, here: Any) -> lorac.Adapter:
    """Return a fresh adapter, or zeros of a method that only PEFT trains, whose files lorac reads and writes."""
    if variant.acts_at_sites:
        return lorac.compile(here, {key: variant}).adapters[key]
    tensors = {
        path: {name: torch.zeros(spec.shape) for name, spec in variant.params(site).items()}
        for path, site in lorac.sites(here).items()
        if path in variant.targets
    }
    return lorac.Adapter(key, variant, tensors)


def configured(key: str) -> tuple[Variant, Host]:
    """Return a configuration of a method, and the first host that it adapts.

    Raises:
        AssertionError: there is none: the oracle's FIELDS, or ``COMPOSED``, give no sizes that fit.
    """
    kind = lorac.variants()[key]
    oracle = f"tests.oracles.{key}"
    fields = importlib.import_module(oracle).FIELDS if _has_fields(oracle) else {}
    variant = samples(kind, **{**fields, **COMPOSED.get(key, {})})[0]
    for host in sorted(KIT.values(), key=lambda host: host.name != "linear"):
        # Keys and values of a prompt are only read, and name the embedding.
        if host.admits(variant) or (host.name == "embedding" and not variant.acts_at_sites):
            return dataclasses.replace(variant, targets=host.paths), host
    raise AssertionError(f"no host for {key}: give its oracle FIELDS, or it an entry in COMPOSED")


def _has_fields(oracle: str) -> bool:
    return importlib.util.find_spec(oracle) is not None and hasattr(importlib.import_module(oracle), "FIELDS")


def _pickled(source: Path, target: Path) -> None:
    """Return the same PEFT folder with its tensors in a .bin file."""
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = {key: tensor.clone() for key, tensor in load_file(source / "adapter_model.safetensors").items()}
    torch.save(tensors, target / "adapter_model.bin")


# ── Formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _adapterhub(folder: Path) -> Iterator[Sound]:
    here = model("tiny_bert")
    for key, variant in HUB.items():
        adapter = _begin(key, variant, here)
        lorac.save_adapter(adapter, folder / "adapterhub" / key, "adapterhub", here)
        yield Sound("adapterhub", key, f"adapterhub/{key}", "tiny_bert")


def _xlora(folder: Path) -> Iterator[Sound]:
    here = model("tiny_llama")
    loras = {name: lorac.LoRA(r=r, targets=["q_proj", "down_proj"]) for name, r in (("a", 2), ("b", 3))}
    experts = list(lorac.compile(here, loras).adapters.values())
    sites = [path for path in lorac.sites(here) if path in experts[0].tensors]
    mixed = lorac.XLoRA.from_loras(experts, sites=sites, hidden="model.norm", hidden_size=64, depth=2, size=4)
    for format in ("xlora", "peft"):
        lorac.save_adapter(mixed, folder / format / "x_lora_of_llama", format, here)
        yield Sound(format, "x_lora", f"{format}/x_lora_of_llama", "tiny_llama")


def _prompts(folder: Path) -> Iterator[Sound]:
    """Write PEFT's own folders of prompts, each type of which is a file of its own."""
    tasks = functools.partial(peft.MultitaskPromptTuningConfig, num_virtual_tokens=3, num_tasks=2, num_ranks=2)
    adaption = functools.partial(peft.AdaptionPromptConfig, adapter_len=2, adapter_layers=1)
    more = {"MULTITASK_PROMPT_TUNING": tasks, "ADAPTION_PROMPT": adaption}
    for name, make in {**CONFIGS, **{name: functools.partial(make, **CAUSAL) for name, make in more.items()}}.items():
        save_prompt(model("tiny_llama"), make(), folder / "peft" / name)
        yield Sound("peft", name, f"peft/{name}", "tiny_llama")


def _autolora(folder: Path) -> Iterator[Sound]:
    names = ("weight_lora", "bias", "weight_out", "norm_lora.weight", "norm_lora.bias")
    (folder / "autolora").mkdir()
    save_file({f"model_dict.site.{name}": torch.ones(11) for name in names}, folder / "autolora/merger.safetensors")
    yield Sound("autolora", "autolora", "autolora/merger.safetensors", "linear")


def _diffusers(folder: Path) -> Iterator[Sound]:
    here = model("pipeline")
    adapter = lorac.compile(here, {"style": lorac.LoRA(r=2, alpha=3, targets=["site", "first"])}).adapters["style"]
    (folder / "diffusers").mkdir()
    lorac.save_adapter(adapter, folder / "diffusers" / "lora.safetensors", "diffusers", here)
    yield Sound("diffusers", "lora", "diffusers/lora.safetensors", "pipeline")


def _kohya(folder: Path) -> Iterator[Sound]:
    (folder / "kohya").mkdir()
    for kind in formats()["kohya"].methods:
        for host in ("divisible", "conv"):
            variant = dataclasses.replace(samples(kind, **OF_LYCORIS.get(kind.name, {}))[0], targets=HOSTS[host].paths)
            adapter = lorac.compile(model(host), {kind.name: variant}).adapters[kind.name]
            place = f"kohya/{kind.name}_{host}.safetensors"
            lorac.save_adapter(adapter, folder / place, "kohya", model(host))
            yield Sound("kohya", kind.name, place, host)


def _checkpoint(folder: Path) -> Iterator[Sound]:
    compiled = lorac.compile(model("two_linear"), {"a": lorac.VeRA(r=2, targets=["first", "second"])})
    (folder / "checkpoint").mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in compiled.state_dict().items()}
    save_file(tensors, folder / "checkpoint/model.safetensors")
    yield Sound("checkpoint", "vera", "checkpoint/model.safetensors", "two_linear")


def _training(folder: Path) -> Iterator[Sound]:
    here, recipe = model("two_linear"), Recipe(adapters={"a": {"method": "vera", "r": 2}})
    compiled: Any = lorac.compile(here, {"a": lorac.VeRA(r=2, targets=["first", "second"])})
    optimizer = torch.optim.AdamW(tensor for tensor in compiled.parameters() if tensor.requires_grad)
    sum(tensor.sum() for tensor in compiled.parameters() if tensor.requires_grad).backward()
    optimizer.step()
    place = folder / "training" / "checkpoint-1"
    place.mkdir(parents=True)
    save_file(compiled.state_dict(), place / "model.safetensors")
    name_optimizer_state(compiled, optimizer)
    torch.save(optimizer.state_dict(), place / "optimizer.pt")
    (place / "trainer_state.json").write_text('{"global_step": 1}')
    run = {"adapters": {"a": {"method": "vera", "settings": {}}}, "base": None, "rows": 8, "processes": 1}
    checkpoints.finish_checkpoint(place, 1, {**run, "recipe": dataclasses.asdict(recipe)})
    yield Sound("training", "vera", "training/checkpoint-1", "two_linear")


def _flylora(folder: Path) -> Iterator[Sound]:
    variant = lorac.FlyLoRA(r=6, top_k=2, alpha=9, targets=["site"])
    adapter = lorac.compile(model("linear"), {"f": variant}).adapters["f"]
    place = folder / "peft" / "fork_of_flylora"
    place.mkdir(parents=True)
    keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_topk_bias": "lora_topk_bias"}
    tensors = {f"base_model.model.site.{keys[key]}": t.detach() for key, t in adapter.tensors["site"].items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({**FORK, "top_k": 2, "bias_u": 0.01}))
    yield Sound("peft", "flylora", "peft/fork_of_flylora", "linear")


def _recipes(folder: Path) -> Iterator[Sound]:
    """Write a recipe as it is, and as the JSON that it amounts to."""
    text = (Path(examples.__path__[0]) / "recipes" / "docs.yaml").read_bytes()
    (folder / "recipe").mkdir()
    (folder / "recipe" / "docs.yaml").write_bytes(text)
    fields = dataclasses.asdict(read_recipe(folder / "recipe" / "docs.yaml"))
    said = {**fields.pop("arguments"), **fields}
    (folder / "recipe" / "docs.json").write_text(json.dumps(said))
    for file in ("docs.yaml", "docs.json"):
        yield Sound("recipe", file, f"recipe/{file}", "")


def _merge_recipes(folder: Path) -> Iterator[Sound]:
    (folder / "merge_recipe").mkdir()
    text = "merge_method: ties\ndtype: float32\nmodels:\n" + "".join(
        f"  - model: {name}\n    parameters: {{weight: 0.5, density: 0.3}}\n" for name in ("a", "b")
    )
    (folder / "merge_recipe" / "ties.yaml").write_text(text)
    yield Sound("merge_recipe", "ties", "merge_recipe/ties.yaml", "")


def _models(folder: Path) -> Iterator[Sound]:
    """Write a model's folder in shards, and next to it an adapter to merge into it."""
    here = model("tiny_llama")
    here.save_pretrained(folder / "model" / "llama", max_shard_size="40KB")
    adapter = lorac.compile(here, {"a": _PAIR}).adapters["a"]
    lorac.save_adapter(adapter, folder / MERGED, "native")
    yield Sound("model", "llama", "model/llama", "")


def _tiny_vision() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3).eval()


OWN = {"tiny_vision": _tiny_vision}
"""Hosts of authors' files, which name the modules of a library's models."""


def _on(host: str, format: str, place: str, *variants: Variant) -> Callable[[Path], Iterator[Sound]]:
    """Return what writes adapters of a host in a format, one of each variant."""

    def write(folder: Path) -> Iterator[Sound]:
        (folder / format).mkdir()
        for variant in variants:
            adapter = lorac.compile(model(host), {variant.name: variant}).adapters[variant.name]
            where = f"{format}/{place.format(variant.name)}"
            lorac.save_adapter(adapter, folder / where, format, model(host))
            yield Sound(format, variant.name, where, host)

    return write


def _meteora(folder: Path) -> Iterator[Sound]:
    here = model("tiny_llama")
    loras = lorac.compile(here, {name: lorac.LoRA(r=2, targets=["q_proj"]) for name in "ab"}).adapters.values()
    (folder / "meteora").mkdir()
    lorac.save_adapter(lorac.MeteoRA.from_loras([*loras], top_k=1), folder / "meteora/it", "meteora", here)
    yield Sound("meteora", "meteora", "meteora/it", "tiny_llama")


def _qst(folder: Path) -> Iterator[Sound]:
    form = {"own_first": False, "vectors": True, "sigmoid": True}
    variant = lorac.QST.of(model("tiny_llama"), r=4, bottleneck=3, **form)
    yield from _on("tiny_llama", "qst", "{}", variant)(folder)


def _bone_of_peft(folder: Path) -> Iterator[Sound]:
    """Write PEFT's retired BONE from its MISS, of which the names differ."""
    for name, variant in (("miss", lorac.MiSS(r=3, targets=["site"])), ("bat", lorac.BAT(r=2, targets=["site"]))):
        host = "linear" if name == "miss" else "divisible"
        place = folder / "peft" / f"bone_{name}"
        adapter = lorac.compile(model(host), {name: variant}).adapters[name]
        lorac.save_adapter(adapter, place, "peft", model(host))
        config = json.loads((place / "adapter_config.json").read_text()) | {"peft_type": "BONE"}
        left = {key: value for key, value in config.items() if key not in {"mini_r", "miss_dropout"}}
        (place / "adapter_config.json").write_text(json.dumps(left))
        tensors = load_file(place / "adapter_model.safetensors")
        renamed = {key.replace("miss_block", "bone_block"): tensor for key, tensor in tensors.items()}
        save_file(renamed, place / "adapter_model.safetensors")
        yield Sound("peft", name, f"peft/bone_{name}", host)


_PAIR = lorac.LoRA(r=2, targets=["q_proj", "down_proj"])
SAMPLES = {
    "gguf": _on("tiny_llama", "gguf", "{}.gguf", _PAIR),
    "mlx": _on("tiny_llama", "mlx", "{}", _PAIR, lorac.DoRA(r=2, targets=["v_proj"]), lorac.Full(targets=["k_proj"])),
    "onnx_adapter": _on("tiny_llama", "onnx_adapter", "{}.onnx_adapter", _PAIR),
    "adaptertune": _on("tiny_vision", "adaptertune", "{}", lorac.AdapterTune(r=2)),
    "bone": _on(
        "tiny_llama", "bone", "{}", lorac.BAT(r=2, targets=["q_proj"]), lorac.MiSS(r=3, targets=["up_proj"])
    ),
    "break_for_make": _on("tiny_llama", "break_for_make", "{}", lorac.PLP(r=2, targets=["q_proj"])),
    "hydra": _on(
        "tiny_vision", "hydra", "{}",
        lorac.Hydra(r=2, r_sequential=1, branch_bias=True, targets=["mlp.fc2", "attn.proj"], modules_to_save=["head"]),
    ),
    "loldu": _on("tiny_llama", "loldu", "{}", lorac.LoLDU(r=3, targets=["q_proj", "down_proj"])),
    "meteora": _meteora,
    "prompts": _prompts,
    "lora_xs": _on("tiny_llama", "lora_xs", "{}", lorac.LoRAXS(r=2, targets=["q_proj", "down_proj"])),
    "qst": _qst,
    "sora": _on("tiny_llama", "sora", "{}", lorac.SoRA(r=3, targets=["q_proj", "down_proj"])),
    "adapterhub": _adapterhub, "diffusers": _diffusers, "kohya": _kohya, "xlora": _xlora, "autolora": _autolora,
    "checkpoint": _checkpoint, "bone_of_peft": _bone_of_peft, "flylora": _flylora, "recipe": _recipes,
    "training": _training, "merge_recipe": _merge_recipes, "model": _models,
}  # fmt: skip
"""Formats, and layouts of a format, that ``write_methods`` does not write -> what writes sound ones."""
FORMATS = frozenset({*SAMPLES, "native", "peft"}) - {
    "bone_of_peft", "flylora", "prompts", "recipe", "training", "merge_recipe", "model",
}  # fmt: skip
"""The formats of which there are sound files."""


# ── Artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _artifacts(folder: Path, wanted: Iterable[tuple[str, str]]) -> Iterator[Sound]:
    torch.manual_seed(0)
    host, x = Two().eval(), torch.randn(3, 24)
    adapters = {"a": lorac.LoRA(r=2, targets=["up", "down"]), "b": lorac.DoRA(r=1, targets=["up"])}
    for target, mode in wanted:
        try:
            if mode == CACHE:
                compiled = lorac.compile(DECODERS["llama"](), TEXT, target, active={"a": 0.7}, cache=True)
            else:
                compiled = lorac.compile(host, adapters, target, {"x": x}, mode=mode, active={"a": 0.7})
        except (lorac.MissingExtra, lorac.Unavailable):  # the target's library, or what it runs on, is not here
            continue
        compiled.save(folder / "artifacts" / f"{target}-{mode}")
        yield Sound("artifact", f"{target} {mode}", f"artifacts/{target}-{mode}", "")
