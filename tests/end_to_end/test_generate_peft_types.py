"""Every PEFT type of language models writes PEFT's tokens, all in one batch whose rows have types of their own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import ArrowConfig, LoraConfig, create_arrow_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from torch import Tensor

import lorac
from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.formats.peft.config import peft_types
from lorac.testing import assert_close
from tests import limits, xlora_files
from tests.peft_files import load_peft, make_peft, quiet, wrap
from tests.refusing import refuses
from tests.runtime.generation.prompted import CONFIGS, VOCABULARY, save_prompt
from tests.zoo import ZOO, tokenizer

# PEFT gives it to its host.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TARGETS = {"eager": {}, "onnxruntime": {"target": "onnxruntime", "cache": True, "self_test": False}}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 3, "subspace_rank": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16, "init_weights": True},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 200, "scaling": 20.0, "init_weights": True},
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 2},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {},
    "PEANUT": {"r": 2, "depth": 1},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2, "random_seed": 7},
    "SUPERTUNING": {"sparsity": 0.8},
    "TINYLORA": {"u": 9},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"]},
    "UNILORA": {"theta_d_length": 500},
    "VBLORA": {"r": 2, "num_vectors": 20, "vector_length": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 200, "scaling": 10.0},
}
"""Type -> settings; the targets are the family's where none are given."""
OTHER_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DoRA": ("LORA", {"r": 4, "use_dora": True}),
    "KaSA": ("LORA", {"r": 1, "kasa_config": KasaConfig()}),
    "BD-LoRA": (
        "LORA",
        {
            "r": 4,
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["down_proj", "fc2"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2
            ),
        },
    ),
    "BAT": ("MISS", {"r": 4, "init_weights": "bat"}),
}
"""Name -> the type whose fields select another class, and these."""
MULTITASK = functools.partial(
    peft.MultitaskPromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2
)
ADAPTION = functools.partial(peft.AdaptionPromptConfig, task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
POLY = functools.partial(peft.PolyConfig, task_type="CAUSAL_LM", r=2, n_tasks=3, n_skills=3, n_splits=2)
WHOLE = ("LILY",)
"""Types that read whole calls, which a cache does not hold."""


PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


def rows_of_the_page() -> list[tuple[str, str, str, str]]:
    """Return type, class, whether with a cache, and how rows have choices of their own, as docs/peft.md has them."""
    pattern = r"^\| (\w+) \| `lorac\.(\w+)` \|.*\| (yes|no) \| (one call|a call each) \|$"
    return re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_no_type_is_missing() -> None:
    names = {*SETTINGS, *CONFIGS, "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "POLY", "XLORA", *WHOLE}
    assert names == set(peft_types()) == {row[0] for row in rows_of_the_page()}
    assert {name for name, _, cached, _ in rows_of_the_page() if cached == "no"} == {*WHOLE}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model, what is adapted in it, and the tokens that it reads.

    Attributes:
        build: makes the model.
        targets: module paths, or their ends.
        ids: a prompt in each row.
        left_out: types that PEFT does not have for it.
        more: further settings by type.
    """

    build: Callable[[], Any]
    targets: list[str]
    ids: Tensor
    left_out: tuple[str, ...] = ()
    more: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def _tiny(kind: str, **sizes: Any) -> Any:
    sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": None, "initializer_range": 0.15}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "llama": Family(
        lambda: _tiny("Llama", num_key_value_heads=2, bos_token_id=1), ["q_proj", "v_proj", "down_proj"], IDS
    ),
    "phi": Family(lambda: _tiny("Phi", bos_token_id=1), ["q_proj", "v_proj", "fc2"], IDS, ("ADAPTION_PROMPT",)),
}


def smollm2() -> Family:
    """SmolLM2, adapted in the first, the middle and the last layer."""
    layers = [
        f"layers.{n}.{one}" for n in (0, 14, 29) for one in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    model: Any = ZOO["smollm2"].fresh()
    texts = ["The adapter of a language model is", "In the morning the sailors saw that"]
    ids = torch.tensor([tokenizer("smollm2")(text)["input_ids"][:6] for text in texts])
    # PEFT's Arrow fails where its LoRAs adapt some of the layers of a name; few reflections hardly move a wide layer.
    return Family(lambda: model, layers, ids, left_out=("Arrow",), more={"HRA": {"r": 32}})


class Types:
    """A family with an adapter of every type, and PEFT's tokens and logits of each.

    Attributes:
        sources: adapter of each name, as lorac takes it.
        tokens: (rows, NEW) of each name, and of the base by the name "".
        logits: (rows, NEW, vocabulary), by which they were chosen; the first tell the answer to the prompt alone.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.model = family, family.build()
        self.sources: dict[str, Any] = {}
        self.tokens: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}
        self._keep("", self.model)
        for name, settings in SETTINGS.items():
            more = {"token_indices": sorted({*family.ids.flatten().tolist()})} if name == "TRAINABLE_TOKENS" else {}
            self._add(name, folder, PEFT_TYPE_TO_CONFIG_MAPPING[name], {**settings, **more})
        for name, (kind, settings) in OTHER_CLASSES.items():
            self._add(name, folder, PEFT_TYPE_TO_CONFIG_MAPPING[kind], settings)
        if "Arrow" not in family.left_out:
            self._add_router(folder)
        for name, make in CONFIGS.items():
            self._keep(name, save_prompt(self.model, make(), folder / name))
            self.sources[name] = folder / name
        self._add_tasks(folder)
        if "ADAPTION_PROMPT" not in family.left_out:
            with quiet(), torch.no_grad():
                wrapped = peft.get_peft_model(copy.deepcopy(self.model), ADAPTION())
                for key, tensor in wrapped.named_parameters():
                    if "adaption_" in key:
                        tensor.normal_(0, 2.0 if "gate" in key else 1.0)
                wrapped.save_pretrained(str(folder / "ADAPTION_PROMPT"))
            self.sources["ADAPTION_PROMPT"] = folder / "ADAPTION_PROMPT"
            self._keep("ADAPTION_PROMPT", load_peft(self.model, folder / "ADAPTION_PROMPT"))

    def _add(self, name: str, folder: Path, config: Any, settings: Mapping[str, Any]) -> None:
        with quiet():
            made = config(**{"target_modules": self.family.targets, **settings, **self.family.more.get(name, {})})
        inputs: Any = {"inputs": {"input_ids": self.family.ids}, "outputs": ("logits",)}
        self._keep(name, make_peft(self.model, folder / name, made, **inputs))
        self.sources[name] = folder / name

    def _add_tasks(self, folder: Path) -> None:
        """Add the second task of a multitask prompt, and of a mixture of skills."""
        task = {"task_ids": torch.ones(len(self.family.ids), dtype=torch.long)}
        name = "MULTITASK_PROMPT_TUNING"
        self._keep(name, save_prompt(self.model, MULTITASK(), folder / name), **task)
        read = lorac.load_adapter(folder / name, self.model, "prompt")
        self.sources[name] = lorac.MultitaskPromptTuning.by_task(read)["prompt-1"]
        wrapped = wrap(self.model, POLY(target_modules=self.family.targets))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    spread = 2.0 if "logits" in key else 0.1
                    parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        with quiet():
            wrapped.save_pretrained(str(folder / "POLY"))
        self._keep("POLY", load_peft(self.model, folder / "POLY").base_model, **task)
        with pytest.warns(lorac.LoracWarning, match="acts as task 0"):
            read = lorac.load_adapter(folder / "POLY", self.model, "poly")
        self.sources["POLY"] = lorac.Poly.by_task(read)["poly-1"]

    def _add_router(self, folder: Path) -> None:
        """Add PEFT's Arrow over LoRAs of rank 1, whose directions its power iteration finds at once."""
        for seed in range(3):
            config = LoraConfig(r=1, lora_alpha=3, target_modules=self.family.targets)
            inputs: Any = {"inputs": {"input_ids": self.family.ids}, "outputs": ("logits",)}
            make_peft(self.model, folder / f"lora{seed}", config, seed=seed, **inputs)
        paths = [str(folder / f"lora{seed}") for seed in range(3)]
        with quiet():
            oracle = create_arrow_model(copy.deepcopy(self.model), paths, ArrowConfig(top_k=2)).eval()
            oracle.save_pretrained(str(folder / "arrow"))
        self._keep("Arrow", oracle)
        self.sources["Arrow"] = lorac.load_adapter(folder / "arrow" / "arrow_router", self.model)

    def _keep(self, name: str, oracle: Any, **given: Any) -> None:
        self.tokens[name], self.logits[name] = write(oracle, self.family.ids, **given)

    def compile(self, way: str) -> Any:
        return lorac.compile(copy.deepcopy(self.model), self.sources, active=None, **TARGETS[way])


@torch.no_grad()
def write(model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens that a model of PEFT's writes, each by a pass over the whole sequence, and their logits.

    PEFT 0.21 hands its prompts to ``generate`` by a name that transformers 5.24 no longer has; its forward is right.
    """
    length, chosen = ids.shape[1], []
    for _ in range(NEW):
        with quiet():
            chosen.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[:, -1])
        ids = torch.cat([ids, chosen[-1].argmax(-1, keepdim=True)], 1)
    return ids[:, length:], torch.stack(chosen, 1)


def assert_writes_as_peft(made: Types, way: str) -> None:
    """Assert that rows of all types, and each type alone, are PEFT's, and that nothing is left when it is off."""
    compiled, ids, names = made.compile(way), made.family.ids, [*made.sources]
    every = [None, *names]
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        off = compiled(**call, adapters=None).logits
        if way == "eager":
            assert torch.equal(off, made.model(**call).logits)
    found = compiled.generate(ids[:1].expand(len(every), -1), **GREEDY, adapters=every)[:, ids.shape[1] :]
    wanted, logits = (torch.stack([of[name or ""][0] for name in every]) for of in (made.tokens, made.logits))
    limits.assert_same_text(found, wanted, logits)
    changed = [name for name in names if not torch.equal(made.tokens[name][0], made.tokens[""][0])]
    assert len(changed) > len(names) / 2  # so that the base's tokens are not what all are compared with
    for name in names:
        with torch.no_grad():
            compiled.swap(name)
            assert_close(compiled(**call).logits[:, -1], made.logits[name][:, 0])
            compiled.swap(None)
            assert torch.equal(compiled(**call).logits, off), name


_MADE: dict[str, Types] = {}


@pytest.fixture(scope="module", autouse=True)
def forgets() -> Iterator[None]:
    yield
    _MADE.clear()


def of_family(name: str, factory: pytest.TempPathFactory) -> Types:
    if name not in _MADE:
        _MADE[name] = Types(FAMILIES[name], factory.mktemp(name))
    return _MADE[name]


@pytest.mark.medium("end_to_end/test_peft_types.py compares answers, runtime/generation/test_prompt_adapters.py tokens")
@pytest.mark.parametrize("way", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_write_as_peft(family: str, way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_writes_as_peft(of_family(family, tmp_path_factory), way)


@pytest.mark.medium("capacity.md says which classes take one call, and runtime/test_rows*.py try them")
def test_the_page_says_which_rows_take_one_call(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = of_family("llama", tmp_path_factory), list[int]()
    compiled, ids, decode = made.compile("onnxruntime"), made.family.ids, OrtProgram.decode

    def record(self: OrtProgram, graph: str, cache: Any, step: Any) -> Tensor:
        calls.append(len(step.counts))
        return decode(self, graph, cache, step)

    monkeypatch.setattr(OrtProgram, "decode", record)
    found = set()
    for name, adapter in compiled.adapters.items():
        calls.clear()
        compiled.generate(ids, **GREEDY, adapters=[name, None])
        rows = set(calls[1 - NEW :])  # in the steps; virtual tokens are read before them, by their rows alone
        assert rows in ({1}, {2}), (name, calls)
        found.add((type(adapter.variant).__name__, "one call" if rows == {2} else "a call each"))
    untried = {"FlyLoRA", "LoRAXS", "QALoRA", "XLoRA"}  # of other files than PEFT's, of GPTQ's layers, by one row
    assert found - {("Arrow", "a call each")} == {
        (cls, by_row) for _, cls, cached, by_row in rows_of_the_page() if cached == "yes" and cls not in untried
    }


@pytest.mark.slow("the same of tiny families")
@pytest.mark.parametrize("way", TARGETS)
def test_smollm2_writes_as_peft(way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    FAMILIES["smollm2"] = smollm2()
    assert_writes_as_peft(of_family("smollm2", tmp_path_factory), way)


def test_types_that_read_whole_calls_write_as_peft(tmp_path: Path) -> None:
    """A row of LILY depends on the others of its call, so that one is compared."""
    family, folder = FAMILIES["llama"], tmp_path / "LILY"
    model, row = family.build(), family.ids[:1]
    lily = make_peft(
        model,
        folder,
        peft.LilyConfig(r=2, target_modules=family.targets),
        inputs={"input_ids": row},
        outputs=["logits"],
    )
    for host, source, oracle in (
        (model, folder, lily),
        (xlora_files.model(), xlora_files.adapter(), xlora_files.of_peft()),
    ):
        tokens, logits = write(oracle, row % 61)
        compiled = lorac.compile(copy.deepcopy(host), {"a": source})
        limits.assert_same_text(compiled.generate(row % 61, **GREEDY)[:, row.shape[1] :], tokens, logits)
        base = compiled.generate(row % 61, **GREEDY, adapters=None)[:, row.shape[1] :]
        assert not torch.equal(base, tokens)
    with refuses("unavailable", match="without a cache"):
        lorac.compile(copy.deepcopy(model), {"a": folder}, **TARGETS["onnxruntime"])
    cached = lorac.compile(xlora_files.model(), {"a": xlora_files.adapter()}, **TARGETS["onnxruntime"])
    limits.assert_same_text(cached.generate(row % 61, **GREEDY, adapters="a")[:, row.shape[1] :], tokens, logits)
