"""Methods, initialisers, optimizers, rules and losses, made from their names and keywords in a recipe."""

import dataclasses
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorac
from lorac import training
from lorac.argument_types import Fields, matches_type
from lorac.errors import OptionError, check_known, nearest_name, not_one_of, short, translate_errors
from lorac.session.compiled import CompiledModule
from lorac.storage.remote import find_source
from lorac.trainer import losses
from lorac.trainer.recipe import NamedSpec
from lorac.training import initialisation
from lorac.training.rule import Rule, check_compatible
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

_CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' }}{% if turn['role'] == 'assistant' %}"
    "{% generation %}{{ turn['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ turn['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GROUP_SETTINGS = ("rank", "update_proj_gap", "scale", "proj_type")


def make_adapters(
    given: Mapping[str, Fields], model: nn.Module, batches: Callable[[], Iterable[object]]
) -> dict[str, Adapter | Variant]:
    """Make the adapters of a recipe: read from files, fresh, or initialised on the model, perhaps from batches.

    Raises:
        OptionError: there is no such method, start or keyword.
        LoracError: as reading, making or beginning one raises it.
    """
    return {name: _make_adapter(name, dict(fields), model, batches) for name, fields in given.items()}


def make_optimizer(spec: NamedSpec, compiled: CompiledModule, learning_rate: float) -> torch.optim.Optimizer:
    """Make the optimizer of the trainable parameters."""
    own, torchs = (_list_classes(module, torch.optim.Optimizer) for module in (training, torch.optim))
    torchs.pop("LBFGS", None)  # it takes a closure at each step
    name, keywords = _look_up(spec, "there is no optimizer", {**torchs, **own})
    tensors: Any = [tensor for tensor in compiled.parameters() if tensor.requires_grad]
    if name in own:
        of_groups = {key: keywords.pop(key) for key in GROUP_SETTINGS if key in keywords}
        tensors = training.galore_groups(compiled, **of_groups)
    made: torch.optim.Optimizer = _construct({**torchs, **own}[name], {"lr": learning_rate, **keywords}, tensors)
    return made


def make_rules(specs: Sequence[NamedSpec], compiled: CompiledModule, optimizer: torch.optim.Optimizer) -> list[Rule]:
    """Attach rules to an optimizer, in their order; raises ``ChoiceError`` if two do not go together."""
    known, rules = _list_classes(training, Rule), list[Rule]()
    for spec in specs:
        name, keywords = _look_up(spec, "there is no rule", known)
        rules.append(_construct(known[name], keywords, compiled, optimizer))
        check_compatible(rules)
    return rules


def make_losses(specs: Sequence[NamedSpec]) -> dict[str, dict[str, Any]]:
    """Return name -> keywords of the terms to add to the loss."""
    found = {}
    for spec in specs:
        name, keywords = _look_up(spec, "there is no loss", losses.LOSSES)
        known = losses.LOSSES[name][1]
        _check_keywords(name, keywords, known)
        wrong = [key for key, value in keywords.items() if not matches_type(value, type(known[key]))]
        found[name] = {**known, **keywords}
        for key in wrong or ["draws"] * (found[name].get("draws", 2) < 2):
            what = f"{name} takes no {key}={short(keywords[key])}"
            raise OptionError(what, next_step=f"give a value such as {known[key]}")
    return found


def make_rewards(names: Sequence[str]) -> list[Any]:
    """Return the functions and models of rewards, by their names.

    Raises:
        OptionError: a name is not in ``trl.rewards``, nor a function ``package.module:function`` or a model.
    """
    from trl import rewards

    known = [name for name in dir(rewards) if name.endswith("_reward") and not name.startswith("get_")]
    found = []
    for name in names:
        what = f"reward_funcs has no {short(name)}"
        step = f"give {', '.join(known)}, package.module:function, or a model of one label"
        with translate_errors(OptionError, what, next_step=step):
            if ":" in name and "/" not in name:
                found.append(pkgutil.resolve_name(name))
            elif (folder := find_source(name, "reward_funcs", OptionError)).is_dir():
                found.append(str(folder))
            else:
                check_known([name], known, "TRL has no reward")
                found.append(getattr(rewards, name))
    return found


def read_chat_template(name: str) -> str:
    """Return a chat template by TRL's name, ``"chatml"``, or its file's path.

    Raises:
        OptionError: there is none.
    """
    import trl

    known = {file.stem: file for file in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
    file = known.get(name, Path(name))
    if name == "chatml":
        return _CHATML
    if not file.is_file():
        what, nearest = f"there is no chat_template {short(name)}", nearest_name(name, [*known, "chatml"], alike=0.6)
        raise OptionError(what, nearest=nearest, next_step="give 'chatml', a file, or one of TRL's, such as qwen3")
    return file.read_text(encoding="utf-8")


def _make_adapter(
    name: str, fields: dict[str, Any], model: nn.Module, batches: Callable[[], Iterable[Any]]
) -> Adapter | Variant:
    if "path" in fields:
        path = fields.pop("path")
        if fields:
            what = f"adapter '{name}' has a path, and also {', '.join(fields)}"
            raise OptionError(what, next_step="leave these fields out: its file holds them")
        return lorac.load_adapter(path, model, name)
    start, known = fields.pop("start", None), lorac.variants()
    spec = {"name": fields.pop("method", None), **fields}
    step = "`lorac variants` lists the methods; or import its module, which makes one of your own known"
    method, keywords = _look_up(spec, f"adapter '{name}': there is no method", known, step)
    variant: Variant = _construct(known[method], keywords)
    if start is None:
        return variant
    starts = _list_classes(initialisation, initialisation.Initialiser)
    begin, keywords = _look_up(start, f"adapter '{name}': there is no start", starts)
    adapter: Adapter = _construct(starts[begin], keywords)(variant, model, batches())
    return adapter


def _look_up(
    spec: NamedSpec, what: str, known: Collection[str], next_step: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the name of a spec, one of those that are known, and its keywords."""
    keywords = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = keywords.pop("name", None)
    if not isinstance(name, str) or name not in known:
        error = not_one_of(what, name, sorted(known))
        raise OptionError(error.what, nearest=error.nearest, next_step=next_step or error.next_step)
    return name, keywords


def _list_classes(module: object, kind: type) -> dict[str, type[Any]]:
    """Return the subclasses of a class that a module names."""
    found = ((name, cls) for name, cls in vars(module).items() if isinstance(cls, type) and cls is not kind)
    return {name: cls for name, cls in found if issubclass(cls, kind)}


def _check_keywords(name: str, keywords: Iterable[str], known: Collection[str]) -> None:
    for key in keywords:
        if key not in known:
            nearest = nearest_name(key, known)
            raise OptionError(f"{name} has no {key}", nearest=nearest, next_step=f"it takes {', '.join(known)}")


def _construct(cls: Any, keywords: Mapping[str, Any], *given: Any) -> Any:
    """Make an object with keywords that it takes: a list as a tuple, and settings of an object as that object."""
    parameters = dict([*inspect.signature(cls).parameters.items()][len(given) :])
    _check_keywords(cls.__name__, keywords, parameters)
    values = {key: _convert(item, parameters[key].default) for key, item in keywords.items()}
    with translate_errors(OptionError, f"{cls.__name__} cannot be made", next_step=f"it takes {', '.join(parameters)}"):
        return cls(*given, **values)


def _convert(item: Any, default: object) -> Any:
    if isinstance(item, Mapping) and dataclasses.is_dataclass(default):
        return _construct(type(default), item)
    return tuple(item) if isinstance(item, list) else item
