"""Models and adapters as users give them: PEFT's objects are accepted, mistakes are rejected with a correction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lorac
from lorac.formats.peft.config import peft_types
from lorac.testing import assert_close
from lorac.variants.base import translate_name
from tests import peft_files
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.zoo import ZOO, fingerprint

MLP = ZOO["plain_mlp"]


# PEFT's models


def wrapped(**settings: Any) -> Any:
    """A PeftModel of two adapters away from their init, the second one on."""
    with peft_files.quiet():
        model: Any = get_peft_model(
            MLP.fresh(), LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], **settings)
        )
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["up"], **settings))
        model.set_adapter("other")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.16 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_a_peft_model_is_its_base_and_its_adapters() -> None:
    model, inputs = wrapped(), MLP.inputs(seed=1)
    before, kinds = fingerprint(model), [type(module) for module in model.modules()]
    compiled = lorac.compile(model)
    assert fingerprint(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert list(compiled.sites) == list(lorac.sites(MLP.model()))
    assert compiled.adapters.keys() == {"default", "other"}
    assert compiled.active == {"other": 1.0}
    base = MLP.model()(**inputs)
    for name in ("other", "default"):
        model.set_adapter(name)
        compiled.swap(name)
        assert_parity(compiled(**inputs), model(**inputs), base)
    # It is compiled again from the base, whose adapters are those that are there now.
    compiled.remove_adapter("other")
    assert compiled.export("eager").adapters.keys() == {"default"}


def test_adapters_given_with_a_peft_model_add_to_or_replace_its_own() -> None:
    compiled = lorac.compile(
        wrapped(),
        {
            "other": lorac.LoRA(r=1, targets=["down"]),
            "more": IA3Config(target_modules=["up"], feedforward_modules=["up"]),
        },
    )
    assert list(compiled.adapters) == ["default", "other", "more"]
    assert compiled.adapters["other"].sites == ("down",)
    assert compiled.active == {}


def test_keeps_modules_to_save_of_a_peft_model() -> None:
    model, inputs = wrapped(modules_to_save=["head"]), MLP.inputs(seed=1)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["other"].weight.mul_(1.5)
    compiled, base = lorac.compile(model), MLP.model()(**inputs)
    assert_parity(compiled(**inputs), model(**inputs), base)
    # Each adapter has a head of its own, and without any the base's is there.
    compiled.swap(None)
    assert torch.equal(compiled(**inputs), base)
    compiled.swap("default")
    model.set_adapter("default")
    assert_parity(compiled(**inputs), model(**inputs), base)


def weaken(model: Any) -> Any:
    """A model in eval mode, whose LoRA changes its outputs by a part of them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.2)
    return model.eval()


@pytest.mark.parametrize("kind", ["wrapped", "injected"])
def test_components_bring_their_adapters(kind: str) -> None:
    """Adapters of one name in several components, as a pipeline's LoRA has them, become one."""
    config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    models = [MLP.fresh(), MLP.fresh()]
    make: Any = get_peft_model if kind == "wrapped" else lambda model, config: inject_adapter_in_model(config, model)
    one, two = (weaken(make(model, config)) for model in models)
    before = fingerprint(one)
    compiled = lorac.compile({"one": one, "two": two, "plain": MLP.model()})
    assert fingerprint(one) == before
    assert compiled.active == {"default": 1.0}
    assert {site.partition(".")[0] for site in compiled.adapters["default"].sites} == {"one", "two"}
    inputs = MLP.inputs(seed=1)
    for name, model in (("one", one), ("two", two)):
        assert_parity(compiled[name](**inputs), model(**inputs), MLP.model()(**inputs))
    assert compiled.export("eager").active == {"default": 1.0}
    compiled.swap(None)
    assert torch.equal(compiled["one"](**inputs), MLP.model()(**inputs))


def test_an_adapter_is_given_for_each_of_several_components(tmp_path: Path) -> None:
    config = [LoraConfig(r=r, target_modules=["up"], init_lora_weights=False) for r in (2, 3)]
    models = [weaken(get_peft_model(MLP.fresh(), each)) for each in config]
    for name, model in zip(("one", "two"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    hosts, inputs = {"one": MLP.fresh(), "two": MLP.fresh()}, MLP.inputs(seed=1)
    compiled = lorac.compile(hosts, {"a": {name: tmp_path / name for name in hosts}})
    for name, model in zip(("one", "two"), models, strict=True):
        assert_parity(compiled[name](**inputs), model(**inputs), MLP.model()(**inputs))
    compiled.add_adapter({"two": tmp_path / "two"}, "late")
    assert compiled.adapters["late"].sites == ("two.up",)
    with refuses("site_not_found", match=r"give it as the adapter of one component: \{'one': path\}"):
        compiled.add_adapter(tmp_path / "one", "x")
    with refuses("choice_error", match="'three' is not the name of a component"):
        compiled.add_adapter({"three": tmp_path / "one"}, "x")
    with refuses("adapter_error", match="a fresh method is given once, for all of them"):
        compiled.add_adapter({"one": lorac.LoRA(r=2)}, "x")


def test_rejects_merged_and_injected_peft_models() -> None:
    merged = wrapped()
    merged.merge_adapter()
    injected = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), MLP.fresh())
    del injected.peft_config
    scaled = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), MLP.fresh())
    scaled.up.set_scale("default", 0.5)
    prompted: Any = get_peft_model(
        ZOO["tiny_llama"].fresh(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    for model, error, said in (
        (merged, lorac.CompileError, r"merged into the base's weight at '.*up'\n.*model.unmerge_adapter\(\)"),
        (injected, lorac.CompileError, r"PEFT's layers in it, at 'up' first(.|\n)*lorac.compile\(base, \[folder\]\)"),
        (scaled, lorac.CompileError, "'default' has a strength other than 1 at 'up'"),
    ):
        with pytest.raises(error, match=said):
            lorac.compile(model)
    assert [*lorac.compile(prompted).adapters] == ["default"]


# Models in torch's wrappers


def torch_compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend="eager"))


@pytest.mark.medium("eager", cases=["*-onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("wrap", [torch_compiled, nn.DataParallel, AveragedModel])
def test_a_wrapper_that_passes_calls_on_stands_for_its_model(wrap: Any, target: str) -> None:
    model, inputs = MLP.fresh().eval(), MLP.inputs(seed=1)
    compiled = lorac.compile(wrap(model), [lorac.LoRA(r=2, targets=["up"])], target=target, example_inputs=inputs)
    assert list(compiled.sites) == list(lorac.sites(wrap(model))) == list(lorac.sites(model))
    compiled.swap(None)
    assert_close(compiled(**inputs), model(**inputs))
    with refuses("compile_error", match="compiled already"):
        lorac.compile(torch_compiled(lorac.compile(model, [])))


def test_rejects_a_model_that_several_processes_share() -> None:
    adapters = [lorac.LoRA(r=2, targets=["up"])]
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with refuses("compile_error", match=r"DistributedDataParallel(.|\n)*model.module"):
            lorac.compile(DistributedDataParallel(MLP.fresh()), adapters)
        with refuses("compile_error", match=r"FSDPModule(.|\n)*before it is sharded"):
            lorac.compile(fully_shard(MLP.fresh()), adapters)
        # What the messages advise.
        compiled: Any = lorac.compile(MLP.fresh(), adapters).train()
        DistributedDataParallel(compiled)(**MLP.inputs()).square().mean().backward()
        assert compiled.adapters["lora"].tensors["up"]["lora_B"].grad is not None
        with refuses("unavailable", match="FSDP trains copies of the tensors of adapter 'lora'"):
            fully_shard(compiled)(**MLP.inputs())
    finally:
        distributed.destroy_process_group()


# PEFT's configurations


def test_a_configuration_of_pefts_is_a_fresh_method() -> None:
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["up", "down"], use_rslora=True)
    expected = lorac.LoRA(r=4, alpha=6, dropout=0.1, targets=("down", "up"), rslora=True)
    compiled = lorac.compile(MLP.model(), {"a": config, "b": expected})
    assert compiled.adapters["a"].variant == expected
    assert compiled.adapters["a"].sites == ("up", "down")
    compiled.add_adapter(LoraConfig(r=2, target_modules="(.*)?up"), "more")
    assert compiled.adapters["more"].variant == lorac.LoRA(r=2, targets="(.*)?up")
    # Heads that PEFT trains by itself for a task are trained here.
    head = lorac.compile(MLP.model(), LoraConfig(r=2, target_modules=["up"], task_type="QUESTION_ANS"))
    assert head.adapters["lora"].variant.modules_to_save == ("qa_outputs",)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(r=4), "names no target_modules"),
        (LoraConfig(r=4, target_modules=["up"], init_lora_weights="gaussian"), "sets init_lora_weights='gaussian'"),
        (LoraConfig(r=4, target_modules=["up"], trainable_token_indices=[1]), r"sets trainable_token_indices=\[1\]"),
        (AdaLoraConfig(target_modules=["up"], total_step=9), "sets total_step=9"),
        (PromptTuningConfig(num_virtual_tokens=2), "is of peft_type PROMPT_TUNING, and only PEFT can initialise that"),
    ],
)
def test_rejects_initialisations_of_peft_that_lorac_lacks(config: Any, said: str) -> None:
    with refuses("unsupported_field", match=said) as error:
        lorac.compile(MLP.model(), {"a": config})
    assert error.value.next_step


# Names of hyper-parameters


def test_hyper_parameters_by_pefts_names_are_answered_by_the_call_that_is_meant() -> None:
    for call, nearest, step in (
        (lambda: lorac.LoRA(rank=8), "r", "write LoRA(r=8)"),
        (lambda: lorac.LoRA(r=8, lora_alpha=16), "alpha", "write LoRA(r=8, alpha=16)"),
        (
            lambda: lorac.VeRA(vera_dropout=0.5, target_modules=["up"]),
            "dropout",
            "write VeRA(dropout=0.5, targets=['up'])",
        ),
        (lambda: lorac.LoRA(r=8, alhpa=16), "alpha", "it has targets, parameters"),
        (lambda: lorac.LoRA(8, 16), None, "write LoRA(r=8, alpha=16)"),
        (lambda: lorac.LoRA(8, targets=["up"]), None, "write LoRA(r=8, targets=['up'])"),
    ):
        with refuses("unknown_field") as error:
            call()
        assert error.value.nearest == nearest
        assert error.value.next_step is not None and error.value.next_step.startswith(step)


def test_every_field_of_pefts_that_is_called_otherwise_here_is_found() -> None:
    """The tables of files and the constructors agree."""
    for method in peft_types().values():
        for variant in method.variants:
            known = variant.__dataclass_fields__
            for name, field in method.fields.items():
                # A word of this one picks among methods that lorac has by switches.
                if field.to in known and name not in known and name != "init_weights":
                    assert translate_name(name, known) == field.to, (method.peft_type, name)


@pytest.mark.parametrize("rank", [0, -1])
def test_rejects_invalid_ranks(rank: int) -> None:
    with pytest.raises(lorac.OptionError, match=f"LoRA takes no r={rank}\n.*numbers from 1; its default is 8"):
        lorac.LoRA(r=rank, targets=["up"])
    with pytest.raises(lorac.AdapterError, match=r"'dropout' of adapter 'a' is 1\.5"):
        lorac.compile(MLP.model(), {"a": lorac.LoRA(dropout=1.5)})


# Everything else


def test_rejects_objects_that_are_not_adapters() -> None:
    tensors = {"base_model.model.up.lora_A.weight": torch.zeros(2, 10)}
    for adapters, said in (
        ({"a": lorac.LoRA}, r"adapter 'a' is the class LoRA\n  give an instance: LoRA\(\)"),
        (lorac.LoRA, "an adapter is the class LoRA"),
        ({"a": tensors}, r"adapter 'a' is a dict(.|\n)*the folder that PEFT saved it in"),
        (tensors, "adapters= is a dict of tensors"),
        ({"a": None}, r"adapter 'a' cannot be None\n  give a path, a method such as"),
        ([("a", lorac.LoRA())], r"an adapter is a pair\n  give a dict: adapters=\{'a': \.\.\.\}"),
        (3, "an adapter cannot be 3"),
    ):
        with pytest.raises(lorac.AdapterError, match=said):
            lorac.compile(MLP.model(), adapters)  # type: ignore[arg-type]  # that is what is tested
    compiled = lorac.compile(MLP.model())
    with pytest.raises(lorac.ChoiceError, match=r"takes the adapter first(.|\n)*write add_adapter\(\.\.\., name='b'\)"):
        compiled.add_adapter("b", lorac.LoRA())  # type: ignore[arg-type]  # the same
    with pytest.raises(lorac.AdapterError, match="adapter 'b' is the class DoRA"):
        compiled.add_adapter(lorac.DoRA, "b")
    assert not compiled.adapters


def test_accepts_paths_of_any_type(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path / "it")

    lorac.save_adapter(lorac.compile(MLP.model(), lorac.LoRA(r=2)).adapters["lora"], tmp_path / "it", model=MLP.model())
    for place in (tmp_path / "it", str(tmp_path / "it"), Place()):
        assert list(lorac.compile(MLP.model(), place).adapters) == ["it"]  # type: ignore[arg-type]  # os.PathLike too


class Pipeline:
    """An object with parts, as diffusers' pipelines are."""

    components: Mapping[str, object] = {"unet": MLP.model(), "scheduler": None}


def test_rejects_objects_that_are_not_models() -> None:
    compiled: Any = lorac.compile(MLP.model(), {"a": lorac.LoRA(r=2)})
    for model, said in (
        (
            compiled,
            r"the model is compiled already\n  compile it again, .* by compiled.export\(target=",
        ),
        ({"one": compiled}, "model 'one' is compiled already"),
        ("gpt2", r"the model is a str: 'gpt2', not an nn.Module\n  load it first"),
        (nn.Linear, r"the class Linear, not an nn.Module\n  give an instance of it: Linear"),
        (None, "the model is None"),
        (
            transformers.LlamaConfig(),
            r"is a LlamaConfig, not an nn.Module\n  make a model from this configuration: transformers.AutoMo",
        ),
        (
            MLP.model().state_dict(),
            r"is a Tensor, not an nn.Module\n  give the model itself; for a state dict, load it",
        ),
        (Pipeline(), r"is a Pipeline, not an nn.Module\n  give its models by name: \{'unet': pipeline.unet\}"),
    ):
        with pytest.raises(lorac.CompileError, match=said) as error:
            lorac.compile(model)
        assert len(str(error.value)) < 250
    assert compiled.export("eager").adapters.keys() == {"a"}


def test_devices_and_dtypes_by_name() -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(lorac.OptionError, match=f"device='{device}' cannot be used here") as error:
            lorac.compile(MLP.model(), device=device)
        assert error.value.nearest == "cpu"
    compiled: Any = lorac.compile(MLP.model(), device="cpu", dtype="float16")
    assert compiled.host.up.weight.dtype is torch.float16


# Targets


def test_each_target_of_a_list_must_name_something() -> None:
    for expected in (
        {"adapters": {"a": lorac.LoRA(targets=["up", "dwn"])}},
        {"adapters": LoraConfig(target_modules=["up", "dwn"])},
        {"reserve": lorac.Reserve(targets=["up", "dwn"], rank=2)},
    ):
        with refuses("site_not_found", match=r"targets 'dwn', which matches no site\n  nearest: down \(1 sites"):
            lorac.compile(MLP.model(), **expected)  # type: ignore[arg-type]  # a dict of different things
    # A name that is there and excluded, or saved whole, is no misspelling.
    variant = lorac.LoRA(targets=["up", "down", "head"], exclude=["down"], modules_to_save=["head"])
    assert lorac.compile(MLP.model(), {"a": variant}).adapters["a"].sites == ("up",)
    with refuses("site_not_found", match="targets 'nrom'"):
        lorac.compile(nn.ModuleDict({"norm": nn.LayerNorm(4)}), {"a": lorac.LNTuning(targets=["norm", "nrom"])})


def test_a_string_of_targets_is_a_regular_expression() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(4, 6)})})
    for text in ("up", "pu"):
        with refuses("site_not_found", match=f"targets '{text}', one regular expression") as error:
            lorac.compile(model, {"a": lorac.LoRA(targets=text)})
        assert error.value.nearest == r"targets=['up'] or targets=r'(.*\.)?up', 1 sites, linear 4 -> 6"
    for targets in (["up"], r"(.*\.)?up"):
        assert lorac.compile(model, {"a": lorac.LoRA(targets=targets)}).adapters["a"].sites == ("block.up",)
