"""Tasks of a transfer: a name, a few seed prompts, and the instructions built from them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lorac.errors import FormatError, OptionError
from lorac.limits import charge_reading
from lorac.storage.strict_json import parse_object, read_json_text

_FILE, _SEEDS = "transfer.json", "seeds.jsonl"
_MARK = "Question: "


def _refuse(reason: str) -> FormatError:
    return FormatError(f"a file of a task {reason}", next_step="write it by Task.save", code="corrupt_file")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A description of an adapter's task that replaces its data in a transfer.

    Attributes:
        name: name of the data, used in the discriminator's question.
        seeds: prompts of the data, one line each; about five.
        instruction: text above the seeds.
        question: the discriminator's question below a prompt, with ``{name}``.
        yes, no: its answers, whose first tokens are compared.
    """

    name: str
    seeds: tuple[str, ...]
    instruction: str = "Here are questions of one kind. Write another."
    question: str = "\nIs the above question from {name} dataset? Answer:"
    yes: str = " yes"
    no: str = " no"

    def __post_init__(self) -> None:
        wrong = next((seed for seed in self.seeds if not seed.strip() or "\n" in seed), None)
        if not self.seeds or wrong is not None:
            found = "none" if wrong is None else f"{wrong!r}, which is empty or has several lines"
            raise OptionError(
                f"the seeds of task '{self.name}' must be prompts of one line each, and there is {found}",
                next_step="give about five prompts of the task's own data",
            )

    def asking(self) -> str:
        """Return the text that a model continues to write another prompt."""
        return "\n".join((self.instruction, *(f"{_MARK}{seed}" for seed in self.seeds), _MARK.rstrip()))

    def written(self, continuation: str) -> str:
        """Return the prompt in a continuation; everything after its first line is dropped."""
        return continuation.strip().partition("\n")[0].strip()

    def about(self, prompt: str) -> str:
        """Return the discriminator's question about a prompt."""
        return prompt + self.question.format(name=self.name)

    def save(self, folder: str | Path) -> None:
        """Write ``transfer.json`` and ``seeds.jsonl`` into a folder, next to the adapters' files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {key: value for key, value in asdict(self).items() if key != "seeds"}
        (folder / _FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / _SEEDS).write_text("".join(json.dumps({"prompt": seed}) + "\n" for seed in self.seeds), "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Task":
        """Read the files of ``save``.

        Raises:
            FormatError: the folder holds no task.
        """

        def read() -> Task:
            fields = parse_object(read_json_text(Path(folder) / _FILE), _refuse)
            lines = read_json_text(Path(folder) / _SEEDS).splitlines()
            return cls(**fields, seeds=tuple(parse_object(line, _refuse)["prompt"] for line in lines))

        try:
            return charge_reading(folder, read)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"'{folder}' does not hold a readable task: {error}",
                next_step="write it by Task.save",
                code="corrupt_file",
            ) from error
