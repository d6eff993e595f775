"""Start a program that ends when the process that started it ends, even when that one is killed.

`command` wraps an argument list; what runs is this file as a script: it asks the kernel for a signal at the
parent's death, then becomes the program. A wrapper and not `preexec_fn`, because Python code between fork and
exec can deadlock in a process with threads (gRPC, Ray).

The kernel watches the *thread* that started the program, not the process: start it from a thread that lives as
long as the program should.

The file imports nothing but the standard library: it runs without site-packages.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def command(program: list[str], with_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """Argument list that runs `program` tied to the life of the calling process and thread.

    with_signal: what the program gets. SIGKILL also ends one that hangs or is stopped: right where acknowledged
    writes survive that.
    """
    # -I and -S: no user or site packages, so the detour costs 10 ms.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(with_signal)), *program]


def _become(parent_pid: int, with_signal: int, program: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, with_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit("the parent ended before the program started")
    os.execv(program[0], program)  # noqa: S606 - the whole purpose: no shell, we become the program


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
