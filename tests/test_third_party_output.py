"""Silence holds in the context that asks for it, and nowhere else."""

import gc
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lorac
from lorac import third_party_output
from lorac.third_party_output import SUPPRESSED_LOGGERS, suppress_third_party_output


class RecordingHandler(logging.Handler):
    """Keeps what reaches a logger."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(params=["transformers", "transformers.anything", "transformers.anything.below", None])
def heard(request):
    """The messages that a handler gets, wherever it is attached: None is the root logger."""
    logger, handler = logging.getLogger(request.param), RecordingHandler()
    propagates = logging.getLogger("transformers").propagate
    logging.getLogger("transformers").propagate = True
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    logging.getLogger("transformers").propagate = propagates


def speak(word):
    logging.getLogger("transformers.anything.below").warning(word)
    warnings.warn(word, FutureWarning, stacklevel=1)


def process_state():
    levels = {name: logging.getLogger(name).level for name in (*SUPPRESSED_LOGGERS, "torch.fx.experimental")}
    return levels, gc.isenabled(), warnings.showwarning


def test_nothing_is_seen_inside_and_everything_after(heard):
    with suppress_third_party_output():
        speak("inside")
    with pytest.warns(FutureWarning, match="after"):
        speak("after")
    assert heard == ["after"]


def test_only_logs_are_dropped_without_warnings(heard):
    with suppress_third_party_output(with_warnings=False), pytest.warns(FutureWarning, match="inside"):
        speak("inside")
    assert heard == []


def test_blocks_may_be_nested_and_may_raise(heard):
    with suppress_third_party_output():
        with pytest.raises(ValueError, match="inside"), suppress_third_party_output():
            raise ValueError("inside")
        speak("still inside")
    with pytest.warns(FutureWarning, match="after"):
        speak("after")
    assert heard == ["after"]


def test_another_thread_is_heard(heard):
    with suppress_third_party_output(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(FutureWarning, match="next to"):  # the suite makes errors of warnings
            pool.submit(speak, "next to").result(10)
        speak("inside")
    assert heard == ["next to"]


def test_a_filter_that_is_set_inside_has_the_last_word():
    with suppress_third_party_output(), warnings.catch_warnings(action="error"):
        with pytest.raises(FutureWarning, match="inside"):
            warnings.warn("inside", FutureWarning, stacklevel=1)
        with suppress_third_party_output():
            warnings.warn("further inside", FutureWarning, stacklevel=1)


def test_filters_are_added_once():
    for _ in range(3):
        with suppress_third_party_output():
            count = len(warnings.filters), [len(handler.filters) for handler in logging.getLogger().handlers]
    with warnings.catch_warnings(action="ignore"), suppress_third_party_output():
        pass
    with suppress_third_party_output():
        assert count == (len(warnings.filters), [len(handler.filters) for handler in logging.getLogger().handlers])


def test_a_logger_with_a_level_of_its_own_speaks():
    """As one does that ``TORCH_LOGS`` names."""
    logger, handler = logging.getLogger("torch.of_its_own"), RecordingHandler()
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.INFO)
        with suppress_third_party_output():
            logger.info("asked for")
        logger.setLevel(logging.NOTSET)
        with suppress_third_party_output():
            logger.error("not asked for")
    finally:
        logger.removeHandler(handler)
    assert handler.messages == ["asked for"]


def test_a_library_without_a_logger_of_its_name_is_not_seen(monkeypatch):
    monkeypatch.setattr(third_party_output, "SUPPRESSED_LOGGERS", ("nameless",))
    logger, handler = logging.getLogger("nameless.passes"), RecordingHandler()
    logger.addHandler(handler)
    try:
        with suppress_third_party_output():
            logger.error("not asked for")
    finally:
        logger.removeHandler(handler)
    assert not handler.messages


class Watched(nn.Module):
    """A linear layer that has another thread look at the process while it is traced and run."""

    def __init__(self, seen):
        super().__init__()
        self.up, self.note = nn.Linear(3, 4), seen.append

    def forward(self, x):
        thread = threading.Thread(target=lambda: self.note(process_state()))
        thread.start()
        thread.join()
        return self.up(x)


def test_levels_warnings_and_the_collector_are_left_alone_while_a_model_is_compiled():
    before, seen = process_state(), []
    variant = lorac.LoRA(r=2, targets=["up"])
    lorac.compile(Watched(seen).eval(), {"a": variant}, target="onnxruntime", example_inputs=(torch.ones(2, 3),))
    assert seen
    assert all(state == before for state in seen)
