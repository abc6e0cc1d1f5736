"""Commands about training: train, transfer."""

import contextlib
import itertools
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorac.cli._models import load_found_model, load_image_processor, load_with_tokenizer, parse_option
from lorac.cli._output import SHOWS_ALL, JsonOption, format_number, make_table, print_report
from lorac.cli.adapters import OutOption
from lorac.errors import OptionError
from lorac.progress import progress
from lorac.runtime.generation.tokenizers import find_inner_tokenizer
from lorac.session.model_folders import MODEL_HELP
from lorac.storage.remote import find_source
from lorac.storage.strict_json import parse_object
from lorac.third_party_output import suppress_third_party_output

_OVERRIDE_HELP = "KEY=VALUE in place of the recipe's, such as adapters.mine.r=8; may be given several times."
_SWEEP_HELP = "KEY=[VALUE, ...]: a run for each value, or combination of several keys, and a table of their losses."
_OPTION_HELP = "KEY=VALUE, a hyper-parameter of the method, such as r=8; may be given several times."


def train(
    config: Annotated[Path, typer.Argument(help="A recipe, in YAML: docs/training.md.", metavar="CONFIG.yaml")],
    model: Annotated[str | None, typer.Option(help=f"Instead of the recipe's. {MODEL_HELP}")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write, instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    override: Annotated[list[str], typer.Option("--override", help=_OVERRIDE_HELP)] = [],  # noqa: B006  (typer's way)
    sweep: Annotated[list[str], typer.Option("--sweep", help=_SWEEP_HELP)] = [],  # noqa: B006  (the same)
    json: JsonOption = False,
) -> None:
    """Train the adapters of a recipe by TRL or transformers: any method, rule, initialiser and optimizer by name."""
    from lorac.trainer import read_recipe
    from lorac.trainer import train as run
    from lorac.trainer.run import leave_process_group

    overrides, grid = dict(map(parse_option, override)), dict[str, Any](map(parse_option, sweep))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise OptionError(f"--sweep {key} needs a list of values", next_step="write --sweep 'seed=[1,2,3]'")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    recipes = [read_recipe(config, {**overrides, **point}) for point in points]
    recipe = recipes[0]
    host, folder = model or recipe.model, out or recipe.out
    for field, path in (("model", host), ("out", folder)):
        if path is None:
            raise OptionError(f"'{config}' has no {field}", next_step=f"add it, or give --{field}")
    place = find_source(host, "the model", OptionError)
    loaded, processing_class = load_found_model(place)
    if recipe.task in ("image-classification", "vlm"):
        processing_class = load_image_processor(
            place, "AutoProcessor" if recipe.task == "vlm" else "AutoImageProcessor"
        )
    else:
        processing_class = find_inner_tokenizer(processing_class)
    if processing_class is None:
        raise OptionError(f"'{host}' has no tokenizer", next_step="save it there: tokenizer.save_pretrained")
    sys.path.append(os.getcwd())  # for reward_funcs
    rows = []
    for point, one in zip(points, recipes, strict=True):
        place = Path(str(folder), ",".join(f"{key}={value}" for key, value in point.items()).replace("/", "_"))
        going_on = resume and (place.exists() or not point)
        quiet = contextlib.nullcontext() if SHOWS_ALL in sys.argv else suppress_third_party_output(with_warnings=False)
        with contextlib.redirect_stdout(sys.stderr), quiet:  # trainers print their log
            names = [*run(loaded, processing_class, one, str(place), resume=going_on).adapters]
        if not grid:
            continue
        history = parse_object((place / "trainer_state.json").read_bytes(), OptionError)["log_history"]
        ends = {key: next((e[key] for e in reversed(history) if key in e), None) for key in ("loss", "eval_loss")}
        rows.append({**point, **ends, "folder": str(place)})
    leave_process_group()
    if not grid:
        print_report({"folder": str(folder), "adapters": names}, f"{folder}: {', '.join(names)}", as_json=json)
        return
    table = make_table(rows[0], (map(format_number, row.values()) for row in rows))
    print_report({"runs": rows}, table, as_json=json)


def transfer(  # noqa: PLR0913, PLR0917  (an argument per option)
    source: Annotated[str, typer.Argument(help=f"The model that has the adapter. {MODEL_HELP}")],
    target: Annotated[str, typer.Argument(help=f"The model that gets one. {MODEL_HELP}")],
    out: OutOption,
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="SOURCE's adapter, a file or folder.")],
    discriminator: Annotated[Path, typer.Option(help="SOURCE's adapter that knows the task's prompts.")],
    task: Annotated[Path, typer.Option(help="The folder of transfer.json and seeds.jsonl: docs/initialisation.md.")],
    method: Annotated[str, typer.Option(help="The new adapter's method, one of `lorac variants`.")] = "lora",
    option: Annotated[list[str], typer.Option("--set", "-s", help=_OPTION_HELP)] = [],  # noqa: B006  (typer's way to say "any number")
    count: Annotated[int, typer.Option(help="How many prompts to train on.")] = 250,
    tokens: Annotated[int, typer.Option(help="The most tokens of a prompt, and of an answer.")] = 48,
    epochs: Annotated[int, typer.Option(help="How often each prompt is learnt.")] = 20,
    lr: Annotated[float, typer.Option(help="The first learning rate, which falls to 0.")] = 2e-4,
    soft: Annotated[
        bool, typer.Option("--soft", help="Learn probabilities; TARGET needs SOURCE's vocabulary.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    json: JsonOption = False,
) -> None:
    """Train an adapter of TARGET on the answers of SOURCE's adapter, without its training data: Trans-LoRA."""
    import lorac
    from lorac.trainer.factories import make_adapters
    from lorac.training.transfer import Task, TransferSettings
    from lorac.training.transfer import transfer as run

    described = Task.load(task)
    settings = TransferSettings(count=count, max_new_tokens=tokens, epochs=epochs, lr=lr, soft=soft, seed=seed)
    model, tokenizer = load_with_tokenizer(target)
    made = make_adapters({"target": {"method": method, **dict(map(parse_option, option))}}, model, tuple)
    student = lorac.compile(model, made)
    student.tokenizer = tokenizer
    base, tokenizer = load_with_tokenizer(source)
    teacher = lorac.compile(base, {"source": adapter, "discriminator": discriminator})
    teacher.tokenizer = tokenizer
    with progress("transfer"):
        done = run(teacher, student, described, settings=settings)
    lorac.save_adapter(done.adapter, out, format="peft" if method == "lora" else "native", model=model)
    contents = {"path": str(out), "prompts": len(done.pairs), "tried": done.tried}
    line = f"{out}: learnt from {len(done.pairs)} prompts, chosen from {done.tried}"
    print_report(contents, line, as_json=json)


COMMANDS = (train, transfer)
