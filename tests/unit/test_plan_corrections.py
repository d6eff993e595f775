"""What a plan corrects its densities and times by: the tenant's share, and a step-time model that is far off."""

from dataclasses import replace
from typing import Any

import pytest

from tempo_router.actions import Action, Retune
from tempo_router.events import ReplicaAttached, ReplicaCapacity, Settled, StepReport
from tempo_router.ledger import Ledger
from tempo_router.prediction import ATOMS, Lengths
from tempo_router.request import Deadline, Latency, ReplicaId, RequestId
from tempo_router.router import RouterCore
from tempo_router.standing import Standing
from tests.builders import AGENT, CHAT, PACE, TOOL, arrived, progressed, request, router
from tests.planned import PlannedJob, planned

UNSURE = replace(PACE, is_unsure=True)


# ---- tenants ----


def tenants(shares: dict[str, float]) -> tuple[Ledger, list[PlannedJob]]:
    """A ledger in which tenants were served these shares of what they asked for, and a like call of each."""
    ledger = Ledger()
    jobs = []
    for name, share in shares.items():
        spec = replace(request(name, slo=TOOL, prompt_tokens=100), tenant=name)
        jobs.append(PlannedJob(spec, Lengths((50.0,) * ATOMS), missing_tokens=100))
        ledger.arrived(jobs[-1])
        account = ledger.tenant(spec)
        assert account is not None
        account.offered, account.served = 1e9, share * 1e9
    return ledger, jobs


def factors(shares: dict[str, float], exponent: float) -> list[float]:
    """What each tenant's density is multiplied by."""
    ledger, jobs = tenants(shares)
    plain = [one.density for one in planned(jobs, PACE, 0.0, ledger=ledger)]
    corrected = planned(jobs, PACE, 0.0, ledger=ledger, tenant_exponent=exponent)
    return [one.density / before for one, before in zip(corrected, plain, strict=True)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_density_is_multiplied_by_the_mean_share_over_the_tenants_own(exponent: float):
    low, high = factors({"low": 0.2, "high": 0.6}, exponent)

    assert low == pytest.approx((0.4 / 0.2) ** exponent)
    assert high == pytest.approx((0.4 / 0.6) ** exponent)


def test_without_an_exponent_tenants_do_not_matter():
    assert factors({"low": 0.0, "high": 1.0}, 0.0) == [1.0, 1.0]


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_ratio_is_kept_within_a_factor_of_eight_both_ways(exponent: float):
    shares = {"served": 1.0, **{f"starved{n}": 0.001 for n in range(40)}}
    served, *starved = factors(shares, exponent)
    assert served == pytest.approx((1 / 8) ** exponent)
    assert starved == pytest.approx([8**exponent] * 40)

    rich, poor = factors({"rich": 1.0, "poor": 0.0}, exponent)
    assert poor == pytest.approx(8**exponent)
    assert rich == pytest.approx(0.5**exponent)


def test_a_tenant_nobody_heard_of_counts_as_the_mean():
    ledger, jobs = tenants({"low": 0.2, "high": 0.6})
    stranger = PlannedJob(replace(jobs[0].spec, tenant="stranger"), jobs[0].lengths, missing_tokens=100)
    (plain,) = planned([stranger], PACE, 0.0, ledger=ledger)
    (corrected,) = planned([stranger], PACE, 0.0, ledger=ledger, tenant_exponent=1.0)

    assert corrected.density == pytest.approx(plain.density)


# ---- a step-time model that is far off ----


def one(slo: Any, now_s: float = 0.0, pace: Any = PACE, output: int = 100, **config: Any) -> Standing:
    """The standing of a single fresh call of 1000 prompt tokens and exactly known length."""
    spec = request(slo=slo, prompt_tokens=1000, max_output_tokens=4096)
    (standing,) = planned(
        [PlannedJob(spec, Lengths((float(output),) * ATOMS), missing_tokens=1000)], pace, now_s, **config
    )
    return standing


@pytest.mark.parametrize("slo", [TOOL, CHAT], ids=["deadline", "stream"])
def test_while_unsure_work_is_priced_at_one_and_a_half_times(slo: Any):
    assert one(slo, pace=UNSURE).density == pytest.approx(one(slo).density / 1.5)


def test_while_unsure_a_deadline_needs_one_and_a_half_times_the_time():
    needed_s = 1.3 * PACE.prefill_s(1000) + 100 * PACE.tau_s
    for seconds, is_sure_of_it, is_unsure_of_it in (
        (0.99 * needed_s, False, False),
        (1.01 * needed_s, True, False),
        (1.49 * needed_s, True, False),
        (1.51 * needed_s, True, True),
    ):
        assert (one(Deadline(seconds)).density > 0) == is_sure_of_it
        assert (one(Deadline(seconds), pace=UNSURE).density > 0) == is_unsure_of_it, f"{seconds / needed_s} times"


def test_while_unsure_a_stream_is_late_sooner():
    needed_s = 1.3 * PACE.prefill_s(1000) + PACE.tau_s
    slo = Latency(1.2 * needed_s, 0.1)
    loss = one(slo, request_weight=0.0).density / one(slo, pace=UNSURE, request_weight=0.0).density

    assert loss > 1.5 * 1.005, "its first token is lost, beside the higher price"
    assert one(Latency(1.6 * needed_s, 0.1), pace=UNSURE).density == pytest.approx(
        one(Latency(1.6 * needed_s, 0.1)).density / 1.5
    )


def test_while_unsure_a_program_has_less_chance_and_costs_more():
    assert one(AGENT, pace=UNSURE, output=4000).density < one(AGENT, output=4000).density / 1.5 * 0.999


def test_while_unsure_less_is_admitted():
    def admitted(pace: Any) -> int:
        jobs = [
            PlannedJob(request(f"r{n}", slo=TOOL, prompt_tokens=1000), Lengths((100.0,) * ATOMS), missing_tokens=1000)
            for n in range(600)
        ]
        return sum(standing.is_admitted for standing in planned(jobs, pace, 0.0))

    sure, unsure = admitted(PACE), admitted(UNSURE)
    assert 0 < unsure < sure < 600
    assert unsure == pytest.approx(sure / 1.5, rel=0.05)


class Told:
    """A router with one call running on a replica that reports steps.

    ratio: the call's density by the last plan, over what it would be if nobody doubted the step-time model.
    """

    def __init__(self) -> None:
        self.core: RouterCore = router(policy="tempo")
        capacity = ReplicaCapacity(4, 2048, 10_000, has_step_planner=True)
        self.now_s = 0.0
        self.ratio: float | None = None
        self.core.handle(ReplicaAttached(0.0, ReplicaId("gpu0"), capacity))
        self.core.handle(Settled(0.0))
        self.core.handle(arrived("r", 0.0, slo=Deadline(1e5), prompt_tokens=100))

    def steps(self, seconds: float, durations_s: tuple[float, ...]) -> None:
        """Steps of two decodes that take these times in turns, for so long."""
        until_s, number = self.now_s + seconds, 0
        while self.now_s < until_s:
            duration_s = durations_s[number % len(durations_s)]
            self.now_s += duration_s
            number += 1
            self.note(self.core.handle(progressed(at_s=self.now_s, step=StepReport(duration_s, 0, 2, 200))))

    def note(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Retune):
                ((_, standing),) = action.standings
                self.ratio = standing.density / self.density_if_sure()

    def density_if_sure(self) -> float:
        """What a plan by the same model gives the call when nobody doubts that model."""
        pace = replace(self.core.steps.pace(), is_unsure=False)
        name = RequestId("r")
        spec = self.core.spec_of(name)
        assert spec is not None
        job = PlannedJob(spec, self.core.lengths_of(name), missing_tokens=spec.prompt_tokens)
        (standing,) = planned([job], pace, self.now_s, ledger=self.core.ledger)
        return standing.density


def test_after_a_minute_far_off_the_router_plans_wider_and_goes_back_when_the_model_is_right_again():
    told = Told()
    steady, erratic = (0.02,), (0.01, 0.01, 0.04, 0.02, 0.06, 0.01, 0.03)
    told.steps(20.0, steady)
    assert not told.core.steps.is_unsure
    assert told.ratio == pytest.approx(1.0)

    told.steps(50.0, erratic)
    assert told.core.steps.relative_error > 0.3
    assert not told.core.steps.is_unsure, "it has been far off for less than a minute"
    told.steps(30.0, erratic)
    assert told.core.steps.is_unsure
    assert told.ratio == pytest.approx(1 / 1.5)

    told.steps(20.0, steady)
    assert not told.core.steps.is_unsure
    assert told.ratio == pytest.approx(1.0)
