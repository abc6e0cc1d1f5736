"""YAML of untrusted recipes: aliases, duplicate names, deep nesting and classes of Python are refused."""

import functools
import re
from pathlib import Path
from typing import Any

from lorac.errors import OptionError
from lorac.limits import charge_reading, check_time
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import translate_os_errors
from lorac.storage.strict_json import JsonObject, dump_json

_MAX_BYTES = 1 << 15
_KINDS = ("str", "int", "float", "bool", "null", "map", "seq")
"""YAML's tags of JSON's types."""


def read_yaml(file: Path, *, next_step: str) -> JsonObject:
    """Read a mapping of names to values of JSON from a recipe.

    Args:
        file: the recipe, of at most 32 KiB.
        next_step: the next step in the error for a file that is not a recipe.

    Raises:
        OptionError: the file cannot be read, is not a mapping, has a name twice or an alias, or is too large or deep.
        FormatError: reading it takes too long.
    """
    import yaml

    with translate_os_errors(file, OptionError, "read"):
        opened = OpenFile(file, follows_links=True)
        if opened.size > _MAX_BYTES:
            raise OptionError(f"'{file}' is larger than {_MAX_BYTES >> 10} KiB", next_step=next_step)
        text = opened.read()

    def read() -> Any:
        given = yaml.load(text, _strict_loader())
        dump_json(given)  # refuses deep nesting
        return given

    try:
        given = charge_reading(file, read)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        problem = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(problem).split())
        said = problem if mark is None else f"{problem} (line {mark.line + 1})"
        raise OptionError(f"'{file}' is not a recipe: {said}", next_step=next_step) from error
    if not isinstance(given, dict):
        raise OptionError(f"'{file}' holds no fields with values", next_step=next_step)
    return given


@functools.cache
def _strict_loader() -> Any:
    """Return PyYAML's safe loader without aliases and repeated names, with YAML 1.2's numbers."""
    import yaml

    class RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            check_time()
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem="a recipe has no aliases", problem_mark=mark)
            node = super().compose_node(parent, index)
            kind, problem = node.tag.rpartition(":")[2], None
            if kind not in _KINDS:
                problem = f"a value reads as {kind}: put it in quotes"
            elif isinstance(node, yaml.ScalarNode):
                try:
                    dump_json(self.construct_object(node))  # a number is finite and of 64 bits, a text can be written
                except ValueError as error:
                    problem = str(error)
            if problem is not None:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names: set[str] = set()
            for key, _ in node.value:
                is_text = key.tag == "tag:yaml.org,2002:str"
                if not is_text or key.value in names:
                    problem = "is given twice" if is_text else "does not read as text: put it in quotes"
                    raise yaml.MarkedYAMLError(
                        problem=f"the name {key.value!r:.40} {problem}", problem_mark=key.start_mark
                    )
                names.add(key.value)
            return super().construct_mapping(node, deep)

    exponent = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return RecipeLoader
