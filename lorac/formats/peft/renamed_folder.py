"""Reading a PEFT folder with layer names that differ from the model's, which are replaced by the model's."""

import re
import tempfile
from pathlib import Path

from lorac.adapters.name_repair import WRAPPERS, find_own_names
from lorac.errors import require_base, unused_error
from lorac.formats._config_fields import ALL_LINEAR, read_fields, write_json
from lorac.formats.peft.config import peft_type_of
from lorac.formats.peft.keys import PREFIX, WRAPPED, shared_name
from lorac.formats.peft.reader import PICKLED, read_folder
from lorac.formats.peft.writer import CONFIG, WEIGHTS
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.storage.tensor_file import write_safetensors
from lorac.variants.adapter import Adapter

_BEGINNING = re.compile(rf"^(?:(?:{'|'.join((*WRAPPERS, re.escape(PREFIX[:-1])))})\.)+")
"""The prefix of a module's path in a key: PEFT's own, any number of times, and names of wrappers."""
_ADAPTER_NAME = re.compile(r"(?<=\.)default\.|\.default$")
"""The name of PEFT's adapter, which its own writer takes out of keys."""
_NAMING = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "trainable_token_indices")
_NAMING_PATTERNS = ("rank_pattern", "alpha_pattern")


def read_renamed(folder: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
    """Read the adapter of a PEFT folder by the model's names; drop the seal and a recorded hash of the base.

    Raises:
        FormatError: the model's name of a module is ambiguous; or as for ``read_folder``.
        BaseNeeded: no model is given.
    """
    view = require_base(view, "only the model tells the right names of layers")
    config, tensors = dict(folder.inside(CONFIG).read_json()), folder.choose(WEIGHTS, PICKLED).read_tensors()
    peft_type = peft_type_of(config, folder.inside(CONFIG).path)
    read_fields(config, peft_type.fields, folder.inside(CONFIG).path)  # so that errors name this file
    shared = {key for key in tensors if shared_name(peft_type, key)}
    marks = "|".join(map(re.escape, (*peft_type.suffixes, *peft_type.shared, WRAPPED, "token_adapter")))
    inner = {key: _ADAPTER_NAME.sub("", _BEGINNING.sub("", key)) for key in tensors if key not in shared}
    paths = {key: re.split(rf"\.(?:{marks})(?:\.|$)", one, maxsplit=1)[0] for key, one in inner.items()}
    own = find_own_names(sorted(set(paths.values())), view)
    if own is None:
        raise unused_error(
            f"no single change of prefixes makes '{min(paths.values())}' and others in '{folder}' the model's names",
            next_step="load the model that the adapter was trained on; `lorac sites MODEL` prints the names of one",
        )
    keys = {key: PREFIX + own[paths[key]] + one.removeprefix(paths[key]) for key, one in inner.items()}
    if keys.items() <= {key: key for key in tensors}.items():
        return read_folder(folder, view, name)
    if len({*keys.values()}) < len(keys):
        raise folder.damaged("without wrappers, two of its tensors have one name")
    if isinstance(config.get("target_modules"), str) and config["target_modules"] != ALL_LINEAR:
        adapted = (path for key, path in paths.items() if inner[key] != path)
        config |= {"target_modules": sorted({own[path] for path in adapted}), "exclude_modules": None}
    for field in (*_NAMING, *_NAMING_PATTERNS):
        given = config.get(field)
        if isinstance(given, dict):
            config[field] = {own.get(key, key): value for key, value in given.items()}
        elif isinstance(given, list):
            config[field] = [own.get(one, one) if isinstance(one, str) else one for one in given]
    with tempfile.TemporaryDirectory() as place:
        write_safetensors(Path(place, WEIGHTS), {keys.get(key, key): one for key, one in tensors.items()}, {})
        write_json(Path(place, CONFIG), config)
        adapter = read_folder(AdapterFile(Path(place)), view, name or folder.adapter_name)
    adapter.provenance["source"] = str(folder)
    return adapter
