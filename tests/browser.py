"""A headless Chromium, driven by the WebDriver protocol, which is a few HTTP requests."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import httpx

from deployments.ports import free_port

START_S = 60.0
HOW_TO = "needs a browser: apt-get install chromium chromium-driver"


def driver_program() -> str | None:
    """Where chromedriver is; None if there is none."""
    return shutil.which("chromedriver")


class Page:
    """One tab."""

    def __init__(self, session: httpx.Client) -> None:
        self._session = session

    def open(self, url: str) -> None:
        """Go there and wait until it has loaded."""
        self._post("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in the page returns."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, what: str, within_s: float = 30.0) -> Any:
        """Run it until what it returns is true."""
        give_up_s = time.monotonic() + within_s
        while not (found := self.run(script)):
            assert time.monotonic() < give_up_s, f"not within {within_s} s: {what}"
            time.sleep(0.1)
        return found

    def complaints(self) -> list[str]:
        """What the page wrote to the console as warnings or errors."""
        return [f"{one['level']}: {one['message']}" for one in self._post("se/log", {"type": "browser"})]

    def picture(self) -> bytes:
        """The visible part as PNG."""
        return b64decode(self._value(self._session.get("screenshot")))

    def _post(self, path: str, body: Any) -> Any:
        return self._value(self._session.post(path, json=body))

    @staticmethod
    def _value(answer: httpx.Response) -> Any:
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value


@contextlib.contextmanager
def browser(program: str, *, width: int = 1280, height: int = 1000, scheme: str = "light") -> Iterator[Page]:
    """A browser until the block ends."""
    port = free_port()
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen([program, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as driver:
                name = _new_session(driver, profile, width, height, scheme)
                with httpx.Client(base_url=f"http://127.0.0.1:{port}/session/{name}/", timeout=START_S) as session:
                    yield Page(session)
                driver.delete(f"/session/{name}")
        finally:
            process.terminate()
            process.wait(30)


def _new_session(driver: httpx.Client, profile: str, width: int, height: int, scheme: str) -> str:
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        f"--window-size={width},{height}", "--hide-scrollbars",
    ]  # fmt: skip
    if scheme == "dark":
        arguments.append("--force-dark-mode")
    options = {"args": arguments}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    give_up_s = time.monotonic() + START_S
    while True:
        try:
            answer = driver.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
        except httpx.TransportError:
            assert time.monotonic() < give_up_s, "chromedriver does not answer"
            time.sleep(0.1)
            continue
        assert answer.status_code == 200, answer.text
        return str(answer.json()["value"]["sessionId"])
