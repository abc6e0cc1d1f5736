"""The page docs/cli.md, made from the code: every command of the command line with its arguments and options.

``python -m docs.make_cli`` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import typer
from click import Command, Parameter

from docs.foot import FOOT
from lorac import cli

HEAD = """# The command line

`lorac COMMAND --help` says the same. The words are those of the Python interface.

Reports are tables that fit the terminal; where there is none, as in a pipe, they are whole, and with `--json` they are
JSON. Long commands show progress on standard error. Errors go there too; these are the exit codes:

```text
{codes}
```

`lorac --install-completion` has the shell complete commands, options and the names of targets, modes and formats.
"""


def page() -> str:
    """Make the whole page."""
    group = typer.main.get_command(cli.app)
    codes = re.findall(r"^    (\d+ .*)$", cli.__doc__ or "", re.MULTILINE)
    before = _table(("option before the command", "meaning"), [_option(one) for one in group.params])
    sections = (_section(name, command) for name, command in group.commands.items())
    return "\n".join((HEAD.format(codes="\n".join(codes)), before, *sections, FOOT))


def _section(name: str, command: Command) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join(["lorac", name, *(one.name.upper() for one in arguments), "[OPTIONS]"])
    lines = [f"\n## {name}\n", command.help, f"\n```console\n$ {usage}\n```\n"]
    rows = [(f"`{one.name.upper()}`", _clean(one.help)) for one in arguments] + [_option(one) for one in options]
    return "\n".join([*lines, _table(("argument or option", "meaning"), rows)])


def _option(option: Parameter) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    needed = " Needed." if option.required else ""
    default = option.default if isinstance(option.default, str | int) and not isinstance(option.default, bool) else None
    return names, _clean(option.help) + needed + (f" Default: `{default}`." if default not in (None, "") else "")


def _clean(text: str) -> str:
    return (text or "").replace("|", "\\|").strip()


def _table(headers: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [" | ".join(headers), " | ".join("---" for _ in headers), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    print(page())
