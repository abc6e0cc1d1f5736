"""Tables of configuration fields that several PEFT types share."""

from collections.abc import Callable

from lorac.formats._config_fields import (
    Applied,
    Field,
    Irrelevant,
    TrainingOnly,
    read_choice,
    read_flag,
    read_int,
    read_layers,
    read_names,
    read_number,
    read_number_pattern,
    read_pattern,
    read_rank_pattern,
    read_size,
    read_targets,
    write_list,
    write_number,
    write_number_pattern,
    write_pattern,
)


def trained(**defaults: object) -> dict[str, Field]:
    """Return fields that only training reads and that are written back, by name and PEFT's default."""
    return {name: TrainingOnly(default, preserved=True) for name, default in defaults.items()}


WITHOUT_FAN: dict[str, Field] = {
    "peft_type": Applied(),
    "task_type": Irrelevant(preserved=True),
    "auto_mapping": Irrelevant(preserved=True),
    "peft_version": Irrelevant(),
    "base_model_name_or_path": Irrelevant(preserved=True),
    "revision": Irrelevant(preserved=True),
    "inference_mode": Irrelevant(False),
    "target_modules": Applied(to="targets", read=read_targets, write=write_pattern),
    "modules_to_save": Applied(to="modules_to_save", read=read_names, write=write_list),
}
"""Fields of the types that have no fan_in_fan_out."""

# PEFT corrects fan_in_fan_out to fit the class of the module, and lorac does the same.
COMMON: dict[str, Field] = {**WITHOUT_FAN, "fan_in_fan_out": Irrelevant(False, read=read_flag)}
"""Fields of almost all types."""

LAYERS: dict[str, Field] = {
    "layers_to_transform": Applied(to="layers", read=read_layers, write=write_list),
    "layers_pattern": Applied(to="layers_pattern", read=read_names, write=write_list),
}
"""Fields that narrow target_modules to some layers."""

EXCLUDE: dict[str, Field] = {"exclude_modules": Applied(to="exclude", read=read_pattern, write=write_pattern)}
FILTERS: dict[str, Field] = {**EXCLUDE, **LAYERS}
"""Fields that narrow target_modules."""
STARTED: dict[str, Field] = {**FILTERS, "init_weights": TrainingOnly(True)}
"""Those, and whether a fresh adapter starts as the base."""

PATTERNS: dict[str, Field] = {
    "rank_pattern": Applied({}, to="rank_pattern", read=read_rank_pattern, write=write_number_pattern),
    "alpha_pattern": Applied({}, to="alpha_pattern", read=read_number_pattern, write=write_number_pattern),
}
"""Ranks and alphas of single modules."""

LYCORIS: dict[str, Field] = {
    **WITHOUT_FAN,
    **FILTERS,
    **PATTERNS,
    "r": Applied(8, to="r", read=read_size),
    "alpha": Applied(8, to="alpha", read=read_number, write=write_number),
    "use_effective_conv2d": Applied(False, to="effective_conv2d", read=read_flag),
    # PEFT drops rows of the update, or the whole update.
    **trained(rank_dropout=0.0, module_dropout=0.0),
    "init_weights": TrainingOnly(True),
}
"""Fields of LOHA, all of which LOKR has as well."""

SEEDED: dict[str, Field] = {
    "projection_prng_key": Applied(0, to="projection_prng_key", read=read_int),
    # If False, the file omits the tensors that the seed determines; lorac always writes them.
    "save_projection": Applied(True, read=read_flag),
    "init_weights": TrainingOnly(True),
}
"""Fields of types whose shared tensors are drawn from a seed."""


def own(read: Callable[[object], object], **defaults: object) -> dict[str, Field]:
    """Return fields with the same names in PEFT and in the variant, all with one reader."""
    return {name: Applied(default, to=name, read=read) for name, default in defaults.items()}


def bias(prefix: str) -> Field:
    """Return the field for the biases that are trained: none, all or ``<prefix>_only``."""
    read = read_choice("none", "all", f"{prefix}_only")
    return Applied("none", to="bias", read=read, write=lambda value: rename_bias(value, prefix))


def rename_bias(value: str, prefix: str) -> str:
    """Replace `<anything>_only` by `<prefix>_only`; return `none` and `all` unchanged."""
    return f"{prefix}_only" if value.endswith("_only") else value
