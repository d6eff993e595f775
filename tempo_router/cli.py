"""`tempo-router`: make workloads, look at them, simulate the scheduler on them, compute what nobody could beat.

With cli_workloads.py and cli_simulate.py, which hold the commands, the one place of this package that has a terminal, a
clock and Ctrl-C. Everything that a user can get wrong ends as one line on stderr and exit status 2, before the first
simulation starts.
"""

import sys

from tempo_router.exit_statuses import EXIT_INTERRUPTED, EXIT_USAGE

try:
    import argparse
    import os
    import warnings
    from collections.abc import Callable, Sequence
    from contextlib import suppress
    from pathlib import Path
    from typing import NoReturn

    from tempo_router.cli_simulate import add_bound, add_simulate
    from tempo_router.cli_workloads import add_convert, add_generate, add_trace
    from tempo_router.errors import TempoError
except KeyboardInterrupt:
    # They take most of a second, in which no main() is there yet to end quietly on Ctrl-C.
    sys.exit(EXIT_INTERRUPTED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `tempo-router` command; returns its exit status."""
    _open_standard_error()
    options = _parser().parse_args(arguments)
    if sys.stdout is None:
        return _fail("the output cannot be written: standard output is closed")
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = command(options)
        # Here, where what is wrong can still be said: a full disk shows only when the buffer is written.
        sys.stdout.flush()
    except TempoError as e:
        return _fail(str(e))
    except BrokenPipeError:
        # The reader of our output has seen enough; Python would complain again when it flushes at exit.
        with suppress(OSError):
            sys.stdout.close()
        return 0
    except OSError as e:
        if e.filename is not None:
            raise  # Files raise errors of their own, so this is a defect; what has no name is stdout.
        with suppress(OSError):
            sys.stdout.close()
        return _fail(f"the output cannot be written: {e.strerror or e}")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def _open_standard_error() -> None:
    """Where it was closed (2>&-) nobody can be told anything, but what is written to it must not end the run."""
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for as long as the process


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tempo-router", description="Workloads, and Tempo's scheduler in simulation.")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_generate(commands.add_parser("generate", help="make a workload from a configuration and a seed"))
    add_convert(commands.add_parser("convert", help="turn a published trace or a benchmark file into a trace"))
    add_trace(commands.add_parser("trace", help="print the statistics of traces"))
    add_simulate(commands.add_parser("simulate", help="run policies on a trace in virtual time"))
    add_bound(commands.add_parser("bound", help="compute the most goodput that any scheduler could get"))
    return parser


def _fail(message: str) -> int:
    sys.stderr.write(f"tempo-router: {' '.join(message.split())}\n")
    return EXIT_USAGE


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """In place of warnings.showwarning, which would add two lines for programmers."""
    sys.stderr.write(f"tempo-router: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
