"""Fits and asks the forest of answer lengths in a process of its own, `python -m cluster.length_process`.

A process and not a thread: scikit-learn takes seconds to import and 100 MB, numpy holds the interpreter for
milliseconds at a time, and a crash in native code would end the router. It runs at low priority and on one core, and
ends with the router. What crosses between the two are plain values (msgpack), never pickles.

A message is its length in four bytes and its content. The router asks, the process answers; one question at a time.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from cluster import die_with_parent
from tempo_router.errors import LengthModelError
from tempo_router.length_regressor import CallFeatures, LengthRegressor, TrainingRow

_PATIENCE_S = 120.0
"""Longest wait for an answer; a fit takes 0.3 s, the first one 3 s more for its imports, on a busy machine 30 s."""
_NICENESS = 10
_LARGEST = 1 << 28
_HEADER = struct.Struct(">I")


class Fit(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Fit a forest to these answers and use it from now on."""

    rows: list[TrainingRow]


class Foretell(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """How long will the answers to these calls be?"""

    calls: list[CallFeatures]


class Fitted(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The forest is in use."""


class Foretold(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Atoms of each call, in the order of the question."""

    atoms: list[list[float]]


class Failed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The question could not be answered; the process goes on."""

    problem: str


_Answer = TypeVar("_Answer", Fitted, Foretold)

_QUESTIONS = msgspec.msgpack.Decoder(Fit | Foretell)
_ANSWERS = msgspec.msgpack.Decoder(Fitted | Foretold | Failed)


class LengthProcess:
    """The router's side. Starts the process; every call blocks and raises LengthModelError, after which it is over.

    One thread makes all calls and must outlive the process, which dies with it (see die_with_parent); `close` may come
    from any thread and ends a call that waits.
    """

    def __init__(self, command: list[str] | None = None, *, patience_s: float = _PATIENCE_S) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(patience_s)
        self._socket = ours
        self._process: subprocess.Popen[bytes]
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            try:
                self._process = subprocess.Popen(
                    die_with_parent.command(command or [sys.executable, "-m", "cluster.length_process"]),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    # Ctrl-C goes to the whole foreground group: the router ends this process when it stops.
                    start_new_session=True,
                )
            except OSError as e:
                ours.close()
                raise LengthModelError(f"the process for answer lengths did not start: {e}") from e

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def fit(self, rows: list[TrainingRow]) -> None:
        """Fit a forest to these answers; later predictions are its."""
        self._ask(Fit(rows), Fitted)

    def foretell(self, calls: list[CallFeatures]) -> list[list[float]]:
        """Atoms for each call, in order. There must have been a fit."""
        atoms = self._ask(Foretell(calls), Foretold).atoms
        if len(atoms) != len(calls):
            raise LengthModelError(f"{len(calls)} calls were asked for, {len(atoms)} lengths were told")
        return atoms

    def close(self) -> None:
        """End the process. Idempotent."""
        self._process.kill()
        # A thread that waits in recv gets the end of the stream; closing alone would leave it there.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._socket.close()

    def _ask(self, question: Fit | Foretell, kind: type[_Answer]) -> _Answer:
        try:
            send(self._socket, msgspec.msgpack.encode(question))
            answer = _ANSWERS.decode(receive(self._socket))
        except (OSError, EOFError, msgspec.MsgspecError) as e:
            raise LengthModelError(
                f"the process for answer lengths gave no answer: {str(e) or type(e).__name__}"
            ) from e
        if not isinstance(answer, kind):
            problem = answer.problem if isinstance(answer, Failed) else f"it told {type(answer).__name__}"
            raise LengthModelError(f"the process for answer lengths failed: {problem}")
        return answer


def send(connection: socket.socket, content: bytes) -> None:
    """Send one message."""
    connection.sendall(_HEADER.pack(len(content)) + content)


def receive(connection: socket.socket) -> bytes:
    """Receive one message. Raises EOFError at the end of the stream."""
    (length,) = _HEADER.unpack(_exactly(connection, _HEADER.size))
    if length > _LARGEST:
        raise EOFError(f"a message of {length} bytes cannot be")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        part = connection.recv(min(count - len(content), 1 << 20))
        if not part:
            raise EOFError("the process has ended")
        content += part
    return bytes(content)


def serve(connection: socket.socket) -> None:
    """Answer questions until the stream ends."""
    regressor: LengthRegressor | None = None
    while True:
        try:
            question = _QUESTIONS.decode(receive(connection))
        except EOFError:
            return
        answer: Fitted | Foretold | Failed
        try:
            match question:
                case Fit(rows=rows):
                    regressor = LengthRegressor.fit(rows)
                    answer = Fitted()
                case Foretell(calls=calls):
                    answer = Foretold(regressor.atoms(calls)) if regressor is not None else Failed("nothing was fitted")
        except (ValueError, MemoryError) as e:
            answer = Failed(repr(e))
        send(connection, msgspec.msgpack.encode(answer))


def main() -> None:
    """Serve the socket that is our standard input."""
    os.nice(_NICENESS)
    with socket.socket(fileno=os.dup(0)) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
