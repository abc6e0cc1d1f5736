"""The table of engines: every row names a format that lorac writes, and files of the engine."""

import pytest

import lorac
from lorac.formats import formats
from lorac.formats.engines import ENGINES, find_engine


@pytest.mark.parametrize("name", ENGINES)
def test_names_a_format_that_is_written_and_the_files_of_its_rules(name):
    engine = ENGINES[name]

    assert formats()[engine.format].writes
    assert engine.version and engine.source and "{path}" in engine.usage
    assert set(engine.refused).isdisjoint(engine.ignored)


def test_rejects_an_engine_that_the_table_lacks_and_names_the_nearest():
    with pytest.raises(lorac.OptionError, match="there is no engine 'vlm'") as caught:
        find_engine("vlm")

    assert caught.value.nearest == "vllm"
