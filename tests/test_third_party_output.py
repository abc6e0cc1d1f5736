"""Silence holds for as long as anyone asks for it, and leaves the process as it was."""

import logging
import threading
import warnings

import pytest

from lorac.third_party_output import SUPPRESSED_LOGGERS, suppress_third_party_output


class _Heard(logging.Handler):
    """Keeps what reaches a logger."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    logger, handler = logging.getLogger("transformers.anything"), _Heard()
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def _speak(word):
    logging.getLogger("transformers.anything").warning(word)
    warnings.warn(word, FutureWarning, stacklevel=1)


def test_nothing_is_seen_inside_and_everything_after(heard):
    with suppress_third_party_output():
        _speak("inside")
    with pytest.warns(FutureWarning, match="after"):
        _speak("after")
    assert heard == ["after"]


def test_a_block_that_raises_is_left_as_any_other():
    before = [logging.getLogger(name).level for name in SUPPRESSED_LOGGERS], warnings.filters[:]
    with pytest.raises(ValueError, match="inside"), suppress_third_party_output():
        raise ValueError("inside")
    assert ([logging.getLogger(name).level for name in SUPPRESSED_LOGGERS], warnings.filters[:]) == before


def test_blocks_of_two_threads_overlap(heard):
    """The first to begin is the first to end: silence lasts until the second ends, and no longer."""
    before = [logging.getLogger(name).level for name in SUPPRESSED_LOGGERS], warnings.filters[:]
    begun, left = threading.Event(), threading.Event()

    def second():
        with suppress_third_party_output():
            begun.set()
            left.wait(10)
            _speak("the first has ended")

    thread = threading.Thread(target=second)
    with suppress_third_party_output():
        thread.start()
        assert begun.wait(10)
    left.set()
    thread.join()
    assert heard == []
    assert ([logging.getLogger(name).level for name in SUPPRESSED_LOGGERS], warnings.filters[:]) == before


def test_a_level_that_is_set_inside_stays():
    """A library imported inside a block sets its own level, and the next block inside holds it back again."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    try:
        with suppress_third_party_output():
            logger.setLevel(logging.INFO)
            with suppress_third_party_output():
                assert not logger.isEnabledFor(logging.ERROR)
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)
