"""The console in a real browser, over a real router with simulated engines and a real Redis: opens, lives, draws."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.metrics import Outcome
from tempo_router.program_ops import CreateProgram, EndCall, FinishProgram
from tempo_router.request import Deadline, Latency, RequestId
from tests.browser import HOW_TO, browser, driver_program
from tests.fleet import Fleet, call, fleet_over_redis, submit
from tests.listening import listening

pytestmark = [pytest.mark.redis, pytest.mark.skipif(driver_program() is None, reason=HOW_TO)]

CONFIG = TempoConfig(
    engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 8, "max_model_len": 4096}),
    scheduling=SchedulingConfig(settle_s=0.05, tick_s=0.02),
)
PICTURES = "TEMPO_TEST_PICTURES"
"""A folder: the pages that the tests saw are kept there, to be looked at."""


async def nothing_else(scope: Any, receive: Any, send: Any) -> None:
    """No model behind the edge: only its own pages are asked for."""
    raise AssertionError(scope["path"])


class Console:
    """A fleet, an edge over it, and its page."""

    def __init__(self, fleet: Fleet, url: str) -> None:
        self.fleet = fleet
        self.url = url
        self.programs = ProgramClient(fleet.clients[0].link.programs)

    async def create(self, name: str, deadline_s: float, tenant: str = "t") -> None:
        await self.programs.ask(CreateProgram(name, tenant, "research", time.time() + deadline_s, name=name))

    async def answer(self, program: str, call_id: str, label: str, parents: tuple[str, ...] = (), tokens: int = 80):
        """A call of a program that is answered at once."""
        identity = Identity("explicit", program, call_id=call_id, label=label, parents=parents)
        ticket = await self.programs.begin(identity, tenant="t", app="", now_epoch_s=time.time())
        self.programs.end(EndCall(program, call_id, 0, "completed", 200, tokens))
        return ticket

    async def begin(self, program: str, call_id: str, label: str, parents: tuple[str, ...]) -> None:
        identity = Identity("explicit", program, call_id=call_id, label=label, parents=parents)
        await self.programs.begin(identity, tenant="t", app="", now_epoch_s=time.time())


@pytest.fixture
async def console(tmp_path: Path) -> AsyncIterator[Console]:
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        await fleet.start(workers=2)
        link = fleet.clients[0].link
        programs = ProgramClient(link.programs)
        edge = HttpEdge(nothing_else, CONFIG, not_ready_because=lambda: link.not_ready_because, programs=programs)
        async with listening(edge) as url:
            yield Console(fleet, f"{url}/console")


async def test_it_opens_lives_and_draws_programs_without_a_complaint(console: Console) -> None:
    await console.create("night report", 60)
    await console.answer("night report", "plan", "plan")
    for number in range(3):
        await console.answer("night report", f"s{number}", "search", ("plan",), tokens=300)
    await console.begin("night report", "sum", "write", ("s0", "s1", "s2"))
    console.fleet.clients[0].link.report_outcome(
        RequestId("x"), Outcome("latency", 0.2, 1.0, 50, 45, 5, 0.1, is_met=False)
    )
    console.fleet.clients[0].link.report_outcome(
        RequestId("y"), Outcome("latency", 0.1, 1.0, 50, 50, 0, 0.1, is_met=True)
    )
    await submit(console.fleet.clients[0], call("running", output_tokens=3000, slo=Latency(5, 1)))
    await console.create("<b>not markup</b>", 30)
    await console.answer("<b>not markup</b>", "a", "<img src=x onerror=alert(1)>")
    await console.programs.ask(FinishProgram("<b>not markup</b>", "t", "op"))
    await asyncio.to_thread(_look, console.url)
    await console.create("a later one", 60)
    await console.answer("a later one", "first", "plan")


def _look(url: str) -> None:
    program = driver_program()
    assert program is not None
    with browser(program) as page:
        page.open(url)
        page.until("return Number(document.body.dataset.updates) >= 3", "it updates by itself")
        said = page.run("return document.getElementById('said').textContent")
        assert said.startswith("live"), said
        graph = "document.querySelector('[data-program=\"night report\"] svg')"
        assert page.run(f"return {graph}.querySelectorAll('circle').length") == 5
        assert page.run(f"return {graph}.querySelectorAll('path').length") == 6
        assert page.run(f"return {graph}.querySelectorAll('animate').length") == 1
        widths = page.run(
            "return [...document.querySelectorAll('[data-program=\"night report\"] .budget span')]"
            ".map(one => one.getBoundingClientRect().width)"
        )
        assert len(widths) == 3
        assert all(width > 0 for width in widths), widths
        assert page.run("return document.querySelectorAll('#workers tbody tr').length") == 2
        assert "50 %" in page.run("return document.getElementById('service').textContent")
        text = page.run("return document.getElementById('programs').textContent")
        assert "<b>not markup</b>" in text
        assert page.run("return document.querySelectorAll('#programs img').length") == 0
        _keep(page.picture(), "console.png")
        assert page.complaints() == []


async def test_it_follows_what_happens_and_says_when_the_server_is_gone(console: Console) -> None:
    program = driver_program()
    assert program is not None
    with browser(program, scheme="dark") as page:
        await asyncio.to_thread(page.open, console.url)
        await asyncio.to_thread(page.until, "return Number(document.body.dataset.updates) >= 1", "it has data")
        assert "None yet" in await asyncio.to_thread(page.run, "return document.getElementById('programs').textContent")
        await console.create("new", 60)
        await console.answer("new", "a", "plan")
        drawn = "return document.querySelectorAll('[data-program=new] circle').length"
        await asyncio.to_thread(page.until, f"{drawn} === 1", "the new program is drawn")
        await console.begin("new", "b", "write", ("a",))
        await asyncio.to_thread(page.until, f"{drawn} === 2", "its second call is drawn")
        about = "document.getElementById('about').textContent"
        assert "refused" not in await asyncio.to_thread(page.run, f"return {about}")
        console.fleet.router.programs.writer.refused = 1
        await asyncio.to_thread(page.until, f"return {about}.endsWith('1 write refused by Redis')", "it is counted")
        _keep(await asyncio.to_thread(page.picture), "console-dark.png")
        assert await asyncio.to_thread(page.complaints) == []


async def test_it_shows_one_tenant_by_a_link_and_by_its_box(console: Console) -> None:
    program = driver_program()
    assert program is not None
    await console.create("ours", 60)
    await console.create("theirs", 60, tenant="a & b")
    shown = "return [...document.querySelectorAll('[data-program]')].map(one => one.dataset.program).sort().join()"
    box = "const box = document.getElementById('tenant');"
    with browser(program) as page:
        await asyncio.to_thread(page.open, f"{console.url}?tenant=a%20%26%20b")
        await asyncio.to_thread(page.until, f"{shown} === 'theirs'", "the link shows one tenant")
        assert await asyncio.to_thread(page.run, f"{box} return box.value") == "a & b"
        _keep(await asyncio.to_thread(page.picture), "console-tenant.png")
        typed = f"{box} box.value = arguments[0]; box.dispatchEvent(new Event('change')); return location.search"
        for tenant, address, names in (("t", "?tenant=t", "ours"), ("", "", "ours,theirs"), ("a & b", None, "theirs")):
            search = await asyncio.to_thread(page.run, typed, tenant)
            assert search == (address if address is not None else "?tenant=a%20%26%20b")
            await asyncio.to_thread(page.until, f"{shown} === '{names}'", f"programs of {tenant!r} are shown")
        await asyncio.to_thread(page.run, typed, "nobody")
        none = "return document.getElementById('programs').textContent.includes('None of this tenant')"
        await asyncio.to_thread(page.until, none, "it says that there are none")
        assert await asyncio.to_thread(page.complaints) == []


async def test_it_shows_every_request_in_its_state(console: Console) -> None:
    """Far more answers are wanted than two engines of eight places can give in time: the plan defers many."""
    client = console.fleet.clients[0]
    for number in range(6):
        await submit(client, call(f"s{number}", output_tokens=3000, slo=Latency(60, 10)))
    for number in range(600):
        await submit(client, call(f"d{number}", prompt_tokens=3500, output_tokens=3000, slo=Deadline(20)))
    for number in range(30):
        await submit(client, call(f"b{number}", output_tokens=3000))
    program = driver_program()
    assert program is not None
    cells = (
        "return Object.fromEntries([...document.querySelectorAll('#queue tr[data-class]')].map(row => "
        "[row.dataset.class, [...row.querySelectorAll('td.count')].map(one => Number(one.textContent))]))"
    )
    with browser(program) as page:
        await asyncio.to_thread(page.open, console.url)
        await asyncio.to_thread(page.until, "return Number(document.body.dataset.updates) >= 1", "it has data")
        waiting = console.fleet.router.snapshot()["core"].states["deadline"]
        assert waiting.deferred + waiting.relegated > 0, waiting

        def is_as_counted() -> bool:
            """The page is a second old at most: between two changes of the queue it shows what is counted now."""
            states = console.fleet.router.snapshot()["core"].states
            order = ("in_turn", "deferred", "relegated", "unplaceable", "unbegun", "begun", "deferred_in_engine",
                     "relegated_in_engine")  # fmt: skip
            counted = {name: [getattr(one, state) for state in order] for name, one in states.items()}
            return bool(page.run(cells) == counted)

        give_up_s = time.monotonic() + 30
        while not await asyncio.to_thread(is_as_counted):
            assert time.monotonic() < give_up_s, "the page never shows what the router counts"
        drawn = "return document.querySelectorAll('#queue tr[data-class=deadline] .stack i').length"
        assert await asyncio.to_thread(page.run, drawn) >= 2
        _keep(await asyncio.to_thread(page.picture), "console-queue.png")
        assert await asyncio.to_thread(page.complaints) == []


def _keep(picture: bytes, name: str) -> None:
    folder = os.environ.get(PICTURES)
    if folder:
        Path(folder, name).write_bytes(picture)
