"""TCP ports of this machine: whether one is free, who has it, and one that stays free for a while."""

import random
import socket
from collections.abc import Collection
from typing import Any

import psutil

# Above what Ray gives its workers (from 10002), below what Serve gives its ingresses (from 30000) and what Linux
# gives to outgoing connections (from 32768): a port of those was seen taken in the seconds before HAProxy bound it.
_QUIET_PORTS = range(20000, 30000)


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there; also sees those who would share the port with us (SO_REUSEPORT)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # With SO_REUSEADDR two may bind; only one may listen.
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port(besides: Collection[int] = ()) -> int:
    """A port that nobody listens on, for one who will bind it seconds later. Raises OSError when there is none.

    besides: free ones that are already meant for others.
    """
    for port in random.sample(_QUIET_PORTS, len(_QUIET_PORTS)):
        if port not in besides and is_free("0.0.0.0", port):
            return port
    raise OSError(f"none of the ports {_QUIET_PORTS.start} to {_QUIET_PORTS.stop - 1} is free")


def describe_listener(port: int) -> str:
    """Who listens on a port, for messages; "" when the system does not say."""
    try:
        connections: list[Any] = psutil.net_connections(kind="inet")
    except (psutil.AccessDenied, OSError):
        return ""
    for each in connections:
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
            try:
                return f" by {psutil.Process(each.pid).name()} (process {each.pid})"
            except psutil.NoSuchProcess:
                return ""
    return ""
