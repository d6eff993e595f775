"""How our processes log: one line an event, `key=value`, on stderr, where Ray and Serve collect it."""

import logging
import os
import sys
import traceback

import structlog

LEVEL_VARIABLE = "TEMPO_LOG_LEVEL"

log = structlog.get_logger()


def configure_logging() -> None:
    """Set structlog up in this process. TEMPO_LOG_LEVEL chooses the level, INFO if unset.

    Tracebacks are printed without the frames' variables: those hold prompts.
    """
    level = logging.getLevelNamesMapping().get(os.environ.get(LEVEL_VARIABLE, "INFO").upper(), logging.INFO)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


def log_unforeseen(event: str, error: Exception, **fields: object) -> None:
    """Log what nobody foresaw and where; neither its message nor the frames' variables: both may hold prompts."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error(event, **fields, error=type(error).__name__, trace=trace)
