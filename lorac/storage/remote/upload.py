"""Upload of adapters and compiled models to the Hugging Face hub, each with a card that describes it."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorac.errors import FormatError, check_known, translate_errors, translate_import_errors

_CARD_FIELDS = ("base_model", "license", "license_name", "license_link")


def push_folder(folder: Path, place: str, facts: Mapping[str, object], snippet: str, options: Mapping[str, Any]) -> str:
    """Upload a folder with a card to a repository, which is created if it does not exist; return the commit's address.

    Args:
        folder: the folder of the files, to which the card is added.
        place: the name of the folder in a repository, without its revision.
        facts: subject -> finding, for the card.
        snippet: Python that loads the folder, with ``{name!r}`` for its name.
        options: the options of ``push_to_hub``; ``base_model`` is the name of the base on the hub, or None.

    Raises:
        OptionError: there is no such option.
        MissingExtra: huggingface_hub is not installed.
        FormatError: the hub takes no files of that name from this user, or cannot be reached.
    """
    check_known(options, ("private", "revision", "token", "message", *_CARD_FIELDS), "push_to_hub has no argument")
    with translate_import_errors():
        import huggingface_hub as hub
    api, revision, message = hub.HfApi(token=options.get("token")), options.get("revision"), options.get("message")
    repo, code = "/".join(place.split("/")[:2]), snippet.format(name=f"{place}@{revision}" if revision else place)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): f"SHA-256 `{_hash(path)}`" for path in files}
    own = {name: options[name] for name in _CARD_FIELDS if name in options}
    header = hub.ModelCardData(library_name="lorac", tags=["lorac", "adapter"], **own).to_yaml()
    first, last = ("\n".join(f"| {name} | {text} |" for name, text in rows.items()) for rows in (facts, hashes))
    table = "| | |\n| --- | --- |\n"
    card = f"---\n{header}\n---\n\n# {repo}\n\n{table}{first}\n\n```python\n{code}\n```\n\n{table}{last}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    refuse, how = partial(FormatError, code="unreadable"), "check the name, and log in: hf auth login, or HF_TOKEN"
    with translate_errors(refuse, f"'{repo}' cannot be written on the hub", next_step=how):
        api.create_repo(repo, private=options.get("private"), exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    return str(made.commit_url)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
