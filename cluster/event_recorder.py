"""Writes what a router is told, asked and decides to a file, for `tempo_router.event_log.replay`."""

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import structlog

from tempo_router.actions import Action
from tempo_router.event_log import Asked, Beginning, asked_line, beginning_line, event_line
from tempo_router.events import Event

log = structlog.get_logger()


class EventRecorder:
    """One router's life in one file: the epoch is appended to the name. Raises OSError if it cannot be made.

    When the disk is full afterwards, the record ends there and the log says so; serving goes on.
    """

    def __init__(self, path: Path, beginning: Beginning) -> None:
        self.path = path.with_name(f"{path.stem}-{beginning.epoch}{path.suffix}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = self.path.open("w", encoding="utf-8")
        self._write(beginning_line(beginning))
        log.info("events_recorded", path=str(self.path))

    def told(self, event: Event, actions: Iterable[Action]) -> None:
        """The core was told this, and decided that."""
        self._write(event_line(event, actions))

    def asked(self, question: Asked) -> None:
        """The core was asked."""
        self._write(asked_line(question))

    def close(self) -> None:
        """Nothing more is written."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._say_cut(error)

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
        except OSError as error:
            self._say_cut(error)
            self.close()

    def _say_cut(self, error: OSError) -> None:
        log.error("record_cut", path=str(self.path), problem=str(error), effect="serving goes on, unrecorded")
