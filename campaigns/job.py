"""The README's job in the environment that runs this file: each step is right, or refused in one sentence.

python -m campaigns.job

Prints releases, and for each step "right", "refused: …" or "WRONG: …". Expected outputs come from the model itself,
with weights to which this file has added B A by hand.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import lorac
from lorac.cli import REFUSED
from lorac.cli import main as command

RANK, ALPHA = 4, 8
TOLERANCE = 1e-4
"""The largest error of float32 as a share of the adapter's own contribution, as in the suite."""
Ids = dict[str, torch.Tensor]
STEPS: dict[str, Callable[[Path], None]] = {}


def step(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a step, which takes an empty folder and raises where something is wrong."""

    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        STEPS[name] = function
        return function

    return add


def perceptron() -> nn.Module:
    """Return a model of no library."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 7)).eval()


def llama(**fields: object) -> tuple[nn.Module, Ids]:
    """Return a tiny decoder of transformers and its inputs."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, **fields
    )
    config.pad_token_id = 0
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model, {"input_ids": torch.randint(3, 128, (2, 7))}


def write_adapter(model: nn.Module, targets: tuple[str, ...], folder: Path, seed: int) -> nn.Module:
    """Write a LoRA as PEFT does; return a copy of the model with it in its weights."""
    merged, tensors = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, module in merged.named_modules():
            if path.endswith(targets):
                down = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
                up = torch.randn(module.out_features, RANK, generator=generator) * 0.5
                tensors |= {
                    f"base_model.model.{path}.lora_A.weight": down,
                    f"base_model.model.{path}.lora_B.weight": up,
                }
                module.weight = nn.Parameter(module.weight + ALPHA / RANK * up @ down)  # of it alone where it is tied
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def check_equal(found: object, expected: object, base: object) -> None:
    """Raise unless outputs differ from those expected by no more than a small share of the adapter's contribution."""
    found, expected, base = (
        torch.as_tensor(getattr(value, "logits", value)).detach() for value in (found, expected, base)
    )
    error = float((found - expected).norm() / (expected - base).norm())
    assert error <= TOLERANCE, f"off by {error:.1e} of the adapter's contribution"


def check_swaps(
    model: nn.Module, inputs: Ids | tuple[torch.Tensor], targets: tuple[str, ...], folder: Path, **options: object
) -> None:
    """Swap two adapters of one compiled model, mix them, and choose one for each row."""
    first, second = (write_adapter(model, targets, folder / name, seed) for seed, name in enumerate("ab"))

    def call(function: Callable[..., object], **choice: object) -> object:
        with torch.no_grad():
            return function(**inputs, **choice) if isinstance(inputs, dict) else function(*inputs, **choice)

    base, one, two = call(model), call(first), call(second)
    example = {} if options["target"] == "eager" else {"example_inputs": inputs}
    compiled = lorac.compile(model, {"a": folder / "a", "b": folder / "b"}, **example, **options)
    for choice, expected in (("a", one), ("b", two), ("a", one)):
        compiled.swap(choice)
        check_equal(call(compiled), expected, base)
    check_equal(call(compiled, adapters="b"), two, base)
    rows = [torch.as_tensor(getattr(value, "logits", value)) for value in (one, two, base)]
    check_equal(call(compiled, adapters=["a", "b"]), torch.stack([rows[0][0], rows[1][1]]), rows[2])
    if options["target"] != "eager":
        compiled.save(folder / "shipped")
        check_equal(call(lorac.load(folder / "shipped"), adapters="b"), two, base)


@step("eager")
def run_eager(folder: Path) -> None:
    check_swaps(perceptron(), (torch.randn(2, 12),), ("0", "2"), folder, target="eager")


@step("ONNX Runtime")
def run_onnxruntime(folder: Path) -> None:
    check_swaps(perceptron(), (torch.randn(2, 12),), ("0", "2"), folder, target="onnxruntime")


@step("transformers, eager")
def run_transformers(folder: Path) -> None:
    model, inputs = llama()
    check_swaps(model, inputs, ("q_proj", "down_proj"), folder, target="eager")
    merged = write_adapter(model, ("q_proj", "down_proj"), folder / "again", 0)
    compiled = lorac.compile(model, {"a": folder / "again"})
    compiled.swap("a")
    check_generation(compiled, merged, inputs)


@step("transformers, training")
def train(folder: Path) -> None:
    model, inputs = llama()
    compiled = lorac.compile(model, {"mine": lorac.LoRA(r=4, targets=["q_proj", "v_proj"])})
    compiled.swap("mine")
    compiled.train()
    optimizer = torch.optim.AdamW((p for p in compiled.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = compiled(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"the loss rises: {losses}"
    compiled.eval()
    lorac.save_adapter(compiled.adapters["mine"], folder / "mine.safetensors", format="native")
    again = lorac.compile(model, {"mine": folder / "mine.safetensors"})
    again.swap("mine")
    with torch.no_grad():
        check_equal(again(**inputs), compiled(**inputs), model(**inputs))


@step("transformers, ONNX Runtime")
def emit_transformers(folder: Path) -> None:
    model, inputs = llama()
    check_swaps(model, inputs, ("q_proj", "down_proj"), folder, target="onnxruntime")


@step("generation over a cache")
def generate(folder: Path) -> None:
    model, inputs = llama()
    merged = write_adapter(model, ("q_proj", "down_proj"), folder / "a", 0)
    compiled = lorac.compile(model, {"a": folder / "a"}, target="onnxruntime", cache=True)
    compiled.swap("a")
    check_generation(compiled, merged, inputs)


def check_generation(compiled: lorac.Compiled, merged: nn.Module, inputs: Ids) -> None:
    """Raise unless the tokens are those of the merged model."""
    options = {"max_new_tokens": 6, "do_sample": False}
    found = compiled.generate(inputs["input_ids"], **options)
    expected = merged.generate(inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]), **options)
    assert found.tolist() == expected.tolist(), "other tokens"


@step("inspect, convert, merge")
def use_files(folder: Path) -> None:
    model, inputs = llama()
    merged = write_adapter(model, ("q_proj", "down_proj"), folder / "a", 0)
    model.save_pretrained(folder / "base")
    run("inspect", folder / "a", "--model", folder / "base")
    run("convert", folder / "a", folder / "a.safetensors", "--to", "native")
    run("convert", folder / "a.safetensors", folder / "back", "--model", folder / "base")
    run("merge", folder / "base", "--adapter", folder / "back", "--out", folder / "merged")
    loaded = type(model).from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        check_equal(loaded(**inputs), merged(**inputs), model(**inputs))


@step("merge into a tied embedding")
def merge_tied(folder: Path) -> None:
    model, inputs = llama(tie_word_embeddings=True)
    merged = write_adapter(model, ("lm_head",), folder / "a", 0)
    model.save_pretrained(folder / "base")
    run("merge", folder / "base", "--adapter", folder / "a", "--out", folder / "merged")
    loaded = type(model).from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        check_equal(loaded(**inputs), merged(**inputs), model(**inputs))


@step("check")
def check_file(folder: Path) -> None:
    model, _ = llama()
    write_adapter(model, ("q_proj", "down_proj"), folder / "a", 0)
    model.save_pretrained(folder / "base")
    run("check", folder / "a", "--model", folder / "base")


@step("PEFT reads what lorac writes")
def read_by_peft(folder: Path) -> None:
    import peft

    model, inputs = llama()
    merged = write_adapter(model, ("q_proj", "down_proj"), folder / "a", 0)
    lorac.save_adapter(lorac.load_adapter(folder / "a", model), folder / "written", format="peft")
    with torch.no_grad():
        base = model(**inputs)
        check_equal(peft.PeftModel.from_pretrained(model, folder / "written")(**inputs), merged(**inputs), base)


def run(*arguments: object) -> None:
    """Run a command of lorac in this process; raises its words where its exit status is not 0."""
    printed = io.StringIO()
    sys.argv = ["lorac", *map(str, arguments)]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            command()
        except SystemExit as stopped:
            status = stopped.code
    if status == REFUSED:
        raise lorac.LoracError(printed.getvalue().rpartition("\nlorac.")[2].partition(": ")[2].splitlines()[0])
    assert not status, f"exit status {status}: {' '.join(printed.getvalue().split())[-300:]}"


def outcome(function: Callable[[Path], None]) -> str:
    """Run a step in an empty folder."""
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(Path(folder))
    except lorac.LoracError as error:
        return f"refused: {error.what}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "right"


def main() -> None:
    """Run all steps, or those that the command line names."""
    releases = {}
    for name in ("torch", "transformers", "peft", "numpy", "onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            releases[name] = metadata.version(name)
    steps = {name: outcome(STEPS[name]) for name in sys.argv[1:] or list(STEPS)}
    print(json.dumps({"versions": releases, "steps": steps}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
