"""The command line: ``python -m campaigns.zoo run | keep | page | causes | then | list``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import campaigns.zoo
from campaigns.zoo import journal, pages
from campaigns.zoo.entries import entries
from campaigns.zoo.generating import FORMS
from campaigns.zoo.running import Asked, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        "python -m campaigns.zoo",
        description=campaigns.zoo.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("do", choices=("run", "keep", "page", "causes", "then", "list"))
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="models whose names hold it")
    parser.add_argument("--family", action="append", default=[], help="models of this family")
    parser.add_argument("--workers", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--limit", type=int, help="so many models, then stop")
    parser.add_argument("--again", action="store_true", help="run what the journal has of this state of the code too")
    parser.add_argument("--no-plain", action="store_true", help="without the export to compare with: faster by a third")
    parser.add_argument("--generation", action="store_true", help="what models generate over a cache, and nothing else")
    parser.add_argument(
        "--engine", action="append", choices=pages.ENGINES, default=[], help="a further target, and nothing else"
    )
    parser.add_argument("--way", action="append", choices=pages.WAYS, help="a target and mode; default: all of them")
    parser.add_argument("--seconds", type=int, default=300, help="of the processor, for one model (default: 300)")
    parser.add_argument("--gibibytes", type=int, default=6, help="of memory, for one model (default: 6)")
    parser.add_argument("--journal", type=Path, default=journal.DEFAULT, help="JSON lines (default: .cache/zoo.jsonl)")
    given = parser.parse_args(arguments)
    {"run": _run, "keep": _keep, "page": _page, "causes": _causes, "then": _then, "list": _list}[given.do](given)


def _run(given: argparse.Namespace) -> None:
    state, versions = journal.code(), journal.versions()
    known = {} if given.again else journal.read(given.journal)
    chosen = [entry for entry in entries(given.only, given.family)]
    ways = given.engine or ([] if given.generation else given.way or list(pages.WAYS))
    left = [e for e in chosen if not _has(known.get(e.name, {}), state, ways)][: given.limit]
    families = {entry.name: entry.family for entry in chosen}
    print(f"{len(chosen)} models, {len(left)} to run on {state}", flush=True)
    asked = Asked(
        given.seconds,
        given.gibibytes,
        tuple(ways),
        plain=bool(ways) and not given.no_plain and not given.engine,
        generates=given.generation,
    )
    for number, (name, record) in enumerate(run([e.name for e in left], asked, given.workers), 1):
        made = {"code": state, "versions": versions, "at": time.strftime("%F")}
        whole = {"family": families[name], **record, **made}
        ended = {name: record[name] for name in ("outcome", "class", "message", "lines") if name in record}
        if given.generation:
            forms = record.get("generation", dict.fromkeys(FORMS, ended) if ended else {})
            whole = {"model": name, "family": families[name], "generation": {**forms, **made}}
        elif given.engine:
            found = dict.fromkeys(given.engine, ended) if ended else record["ways"]
            engines = {engine: {**found[engine], **made} for engine in given.engine}
            whole = {"model": name, "family": families[name], "engines": engines}
        journal.append(given.journal, whole)
        print(f"{number}/{len(left)} {name}: {pages.summary(whole)}", flush=True)


def _has(record: journal.Record, state: str, ways: list[str]) -> bool:
    """Whether the journal says what came of a model on this state of the code, all ways asked for."""
    if not ways:
        return record.get("generation", {}).get("code") == state
    if {*ways} <= {*pages.ENGINES}:
        return all(record.get("engines", {}).get(way, {}).get("code") == state for way in ways)
    return record.get("code") == state and ("outcome" in record or record["ways"].keys() >= set(ways))


def _keep(given: argparse.Namespace) -> None:
    """Put a journal's records in the place of those kept; name the models that no journal has said anything of."""
    unknown = {e.name: {"model": e.name, "family": e.family, "ways": {}, "outcome": pages.NOT_RUN} for e in entries()}
    known = journal.read(journal.KEPT, given.journal)
    found = {name: known.get(name, {}) for name in unknown}
    journal.keep(journal.KEPT, (one if "ways" in one else {**unknown[name], **one} for name, one in found.items()))


def _page(given: argparse.Namespace) -> None:
    sys.stdout.write(pages.kept_page())


def _causes(given: argparse.Namespace) -> None:
    sys.stdout.write(pages.causes(journal.read(given.journal).values()))


def _then(given: argparse.Namespace) -> None:
    sys.stdout.write(pages.once_refused(journal.read(journal.KEPT, given.journal).values()))


def _list(given: argparse.Namespace) -> None:
    for entry in entries(given.only, given.family):
        print(f"{entry.family:20} {entry.name}")


if __name__ == "__main__":
    main()
