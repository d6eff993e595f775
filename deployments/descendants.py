"""Everything that this process started, directly or not, and how to end it.

Ray's daemons, HAProxy and engine processes leave their parents: when one dies, its children are handed to init and
nobody knows whose they were. A subreaper gets them instead, so that they stay in our tree until they end.
"""

import contextlib
import ctypes
import os
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on, descendants whose parent dies become children of this process; it has to reap them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def living_descendants() -> list[psutil.Process]:
    """All processes below this one that have not ended; zombies have."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def end_descendants(grace_s: float) -> list[str]:
    """End all of them: asked to, then killed when `grace_s` seconds have passed. Returns what was found, by name.

    Ends only when none is left, so what they start meanwhile ends too.
    """
    found: dict[int, str] = {}
    kill_at_s = time.monotonic() + grace_s
    while living := living_descendants():
        must_kill = time.monotonic() >= kill_at_s
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                if must_kill:
                    process.kill()
                elif process.pid not in found:
                    process.terminate()
                found.setdefault(process.pid, f"{process.name()} ({process.pid})")
        psutil.wait_procs(living, timeout=0.1)
    reap()
    return list(found.values())


def reap() -> None:
    """Collect the exit status of children that have ended, the adopted ones too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
