"""The embedded Redis server: who starts it, who shares it, how it ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis
from cluster.redis_store import RedisStore
from tempo_router.errors import StoreUnavailableError

pytestmark = pytest.mark.redis


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        threading.Event().wait(0.01)


def servers_in(folder: Path) -> list[int]:
    """Redis servers, or what is about to become one, that keep their data under this folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder / "redis") in arguments:
            found.append(process.info["pid"])
    # A running redis-server rewrites its command line: its working directory remains.
    for process in psutil.process_iter(["pid", "name", "status"]):
        if process.info["name"] == "redis-server" and process.info["status"] != psutil.STATUS_ZOMBIE:
            try:
                if Path(process.cwd()) == folder / "redis":
                    found.append(process.info["pid"])
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
    return found


async def test_data_survives_a_stop_and_a_kill(tmp_path: Path) -> None:
    for expected, content in [(None, b"one"), (b"one", b"two"), (b"two", b"three")]:
        server = start_embedded_redis(tmp_path)
        store = await RedisStore.connect(server.url, "tempo")
        assert await store.load_snapshot("lengths") == expected
        await store.save_snapshot("lengths", content, await store.acquire_lease("router", 30.0))
        await store.close()
        if content == b"two":
            os.kill(server.pid, signal.SIGKILL)
        server.stop()
        server.stop()  # a second stop changes nothing
    assert servers_in(tmp_path) == []


async def test_a_second_start_uses_the_running_server(own_server: EmbeddedRedis, tmp_path: Path) -> None:
    second = start_embedded_redis(tmp_path)

    assert (second.url, second.owned, second.pid) == (own_server.url, False, None)
    assert own_server.owned
    second.stop()
    store = await RedisStore.connect(own_server.url, "tempo")  # only its owner ends it
    await store.close()
    assert servers_in(tmp_path) == [own_server.pid]


def test_many_starts_at_once_make_one_server(tmp_path: Path) -> None:
    found: list[EmbeddedRedis] = []
    threads = [threading.Thread(target=lambda: found.append(start_embedded_redis(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    try:
        assert len(found) == 8
        assert sum(server.owned for server in found) == 1
        assert len({server.url for server in found}) == 1
        assert len(servers_in(tmp_path)) == 1
    finally:
        for server in found:
            server.stop()


OWNER = """
import sys, threading
from cluster.embedded_redis import start_embedded_redis
server = start_embedded_redis(sys.argv[1])
print("SERVER", server.pid, flush=True)
threading.Event().wait()
"""


def test_a_killed_owner_leaves_no_server_behind_and_no_lock(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as owner:
        try:
            assert owner.stdout is not None
            pid = next(int(line.split()[1]) for line in owner.stdout if line.startswith("SERVER"))
            assert psutil.Process(pid).name() == "redis-server"
        finally:
            owner.kill()
    wait_until(lambda: servers_in(tmp_path) == [], "the server of a killed owner ends")

    again = start_embedded_redis(tmp_path)
    assert again.owned
    again.stop()


def test_the_server_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    """The kernel ties a child to the thread that made it; ours is made by a thread of its own."""
    found: list[EmbeddedRedis] = []
    thread_ids: list[int] = []

    def ask() -> None:
        thread_ids.append(threading.get_native_id())
        found.append(start_embedded_redis(tmp_path))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(30)
    wait_until(lambda: not Path(f"/proc/self/task/{thread_ids[0]}").exists(), "the thread is gone")
    (server,) = found
    try:
        # Commands answered one after the other after the thread's end: a pending SIGKILL would have struck.
        for _ in range(20):
            assert not start_embedded_redis(tmp_path).owned
        assert psutil.Process(server.pid).is_running()
    finally:
        server.stop()


def test_a_data_folder_with_a_long_name_works(tmp_path: Path) -> None:
    """A socket's path holds 107 bytes; the data stays in the folder, the socket moves."""
    folder = tmp_path / ("long-" * 30)
    server = start_embedded_redis(folder)
    attached = start_embedded_redis(folder)
    try:
        assert str(folder) not in server.url
        assert attached.url == server.url
        assert (folder / "redis" / "appendonly.aof").exists()
    finally:
        server.stop()


def test_broken_data_is_reported_with_the_servers_own_words(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonly.aof").write_bytes(b"*1\r\nnot what redis wrote\r\n" * 10)

    with pytest.raises(StoreUnavailableError, match=r"(?s)ended at once.*Bad file format reading the append only file"):
        start_embedded_redis(tmp_path)
    assert servers_in(tmp_path) == []


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailableError, match=r"cannot keep Redis data in .*file/redis.*choose another data_dir"):
        start_embedded_redis(tmp_path / "file")


def test_a_server_that_hangs_is_not_joined_by_a_second_one(own_server: EmbeddedRedis, tmp_path: Path) -> None:
    """Two servers on one append-only file would destroy it."""
    process = psutil.Process(own_server.pid)
    process.suspend()
    try:
        with pytest.raises(StoreUnavailableError, match="belongs to a Redis server that has not answered"):
            start_embedded_redis(tmp_path, start_timeout_s=0.3)
    finally:
        process.resume()
