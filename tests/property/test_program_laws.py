"""Laws of a program that is relegated, and of one whose deadline moves, over every history around them.

The histories of `RouterMachine`, in a world that begins with a router that serves a program: else few would have one
whose calls wait and run where steps are planned.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from tempo_router.ledger import Program
from tests.builders import AGENT, planned_replica, request
from tests.property.test_router_core import RouterMachine, WorldCall, WorldReplica


class ProgramMachine(RouterMachine):
    """Histories of a router that serves a program."""

    @initialize(
        policy=st.sampled_from(("fcfs", "tempo", "tempo")),
        hopeless=st.sampled_from(("relegate", "refuse")),
        depth=st.integers(0, 2),
        limit=st.just(10_000),
    )
    def start(self, policy: str, hopeless: str, depth: int, limit: int) -> None:
        super().start(policy, hopeless, depth, limit)
        self.router_settles()
        event = planned_replica("planned", max_running=2)
        self.attach(event.replica_id, WorldReplica(event.capacity))
        for _ in range(3):
            self.program_goes_on()

    @rule()
    def program_goes_on(self) -> None:
        self.submit_first(request(self.new_name(), slo=AGENT, arrival_s=self.now_s, prompt_tokens=10))

    @rule(seconds=st.sampled_from((0.1, 1.0)))
    def program_is_relegated_for_a_while(self, seconds: float) -> None:
        """So long that a plan is made."""
        self.program_is_relegated()
        self.time_passes(seconds)

    @invariant()
    def a_relegated_program_is_behind_as_a_whole(self) -> None:
        """Its calls that wait, those that run, and what their engines were told of them."""
        for program in self.programs():
            if program.is_lost:
                counting = [name for name, job in program.live.items() if not job.is_relegated]
                assert not counting, f"calls of a relegated program count: {counting}"
                ahead = [call.spec.request_id for call in self.planned_calls(program) if not call.standing.is_relegated]
                assert not ahead, f"their engines let calls of a relegated program count: {ahead}"

    def programs(self) -> list[Program]:
        return list(self.core.ledger.programs.values()) if hasattr(self, "core") else []

    def planned_calls(self, program: Program) -> list[WorldCall]:
        """Its calls in engines whose steps are planned."""
        places = [self.running[name] for name in program.live if name in self.running]
        replicas = [(self.replicas[place.replica_id], place.dispatch_id) for place in places]
        return [replica.calls[name] for replica, name in replicas if replica.capacity.has_step_planner]


TestProgramLaws = ProgramMachine.TestCase
TestProgramLaws.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
