"""Suppression of the output of libraries that lorac calls, in the calling context only.

While a model is captured and emitted, these libraries log and warn of their own deprecations and steps, which a user
cannot change. A failure is raised as lorac's own error, and a model's own warnings appear where it is called. Levels,
filters and handlers of the process keep their effect for all other threads: one filter of logs and one of warnings are
added to them, and both let everything pass outside a silent context.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SUPPRESSED_LOGGERS = ("torch", "transformers", "onnxscript", "onnx_ir")
"""Libraries whose messages are dropped, except from a logger below them with its own level (``TORCH_LOGS``)."""
_suppressing: ContextVar[str] = ContextVar("suppressing", default="")
"""``"all"``, ``"logs"`` or nothing."""


@contextmanager
def suppress_third_party_output(*, with_warnings: bool = True) -> Iterator[None]:
    """Drop the logs of torch, transformers and the ONNX libraries in this context, and by default all warnings."""
    loggers = [logging.getLogger()]
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.handlers and name.split(".")[0] in SUPPRESSED_LOGGERS:
            loggers.append(logger)
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in filter(None, (*handlers, logging.lastResort)):
        if _LOG_FILTER not in handler.filters:
            handler.addFilter(_LOG_FILTER)
    # Before all others: `warnings.filterwarnings` does not take an object as a pattern.
    filters: list[object] = warnings.filters  # type: ignore[assignment]  # typed as a sequence of patterns
    if filters[:1] != [_WARNING_FILTER]:
        while _WARNING_FILTER in filters:
            filters.remove(_WARNING_FILTER)
        filters.insert(0, _WARNING_FILTER)
    token = _suppressing.set("all" if with_warnings else "logs")
    try:
        yield
    finally:
        _suppressing.reset(token)


class _LogFilter(logging.Filter):
    """A filter that drops the libraries' records in a silent context."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether handlers should handle a record."""
        library, *_ = record.name.split(".")
        if not _suppressing.get() or library not in SUPPRESSED_LOGGERS:
            return True
        # A record is also handled where a level was set at its logger, or between that and the library's.
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.name not in (library, "root"):  # a library may have no logger of its name
            if logger.level != logging.NOTSET:
                return True
            logger = logger.parent
        return False


_LOG_FILTER = _LogFilter()


class _InSilentContext:
    """A stand-in for the pattern of a warning filter, which matches any message in a silent context."""

    def match(self, message: str) -> bool:
        """Return whether the filter applies."""
        return _suppressing.get() == "all"


_WARNING_FILTER = ("ignore", _InSilentContext(), Warning, None, 0)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars in the whole process during the block; only for programs, not for libraries."""
    from transformers.utils import logging as bars

    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()
