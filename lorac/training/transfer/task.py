"""A task as a transfer knows it: a name, a few prompts to go by, and how a model is asked for more and about them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lorac.errors import FormatError, OptionError

_FILE, _SEEDS = "transfer.json", "seeds.jsonl"
_MARK = "Question: "


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is kept with an adapter so that it can be transferred: not its data, but five prompts of them.

    Attributes:
        name: of the data, which the discriminator is asked by.
        seeds: prompts of the data, of one line each; shown to whoever writes more.
        instruction: what stands above them.
        question: what the discriminator is asked below a prompt, with ``{name}``.
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
            told = "none" if wrong is None else f"{wrong!r}, which is empty or has several lines"
            raise OptionError(
                f"the seeds of task '{self.name}' are prompts of a line each, and there is {told}",
                next_step="give about five prompts of the task's own data",
            )

    def asking(self) -> str:
        """What a model goes on with that is to write another prompt."""
        return "\n".join((self.instruction, *(f"{_MARK}{seed}" for seed in self.seeds), _MARK.rstrip()))

    def written(self, continuation: str) -> str:
        """The prompt in what a model went on with; whatever it says after that, its own answer too, is dropped."""
        return continuation.strip().partition("\n")[0].strip()

    def about(self, prompt: str) -> str:
        """What the discriminator is asked of a prompt."""
        return prompt + self.question.format(name=self.name)

    def save(self, folder: str | Path) -> None:
        """Write ``transfer.json`` and ``seeds.jsonl`` into a folder, beside the adapters' own."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        told = {key: value for key, value in asdict(self).items() if key != "seeds"}
        (folder / _FILE).write_text(json.dumps(told, indent=2) + "\n")
        (folder / _SEEDS).write_text("".join(json.dumps({"prompt": seed}) + "\n" for seed in self.seeds))

    @classmethod
    def load(cls, folder: str | Path) -> Task:
        """What ``save`` wrote.

        Raises:
            FormatError: the folder holds no task.
        """
        try:
            told = json.loads((Path(folder) / _FILE).read_text())
            seeds = [json.loads(line)["prompt"] for line in (Path(folder) / _SEEDS).read_text().splitlines()]
            return cls(**told, seeds=tuple(seeds))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"'{folder}' holds no task that can be read: {error}",
                next_step="write it by Task.save",
                code="corrupt_file",
            ) from error
