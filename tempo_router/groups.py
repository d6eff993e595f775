"""Siblings of one client request (`n` > 1): one verdict for all, one replica for all."""

from tempo_router.actions import RejectReason
from tempo_router.request import GroupId, ReplicaId, RequestSpec

_MAX_ABANDONED = 4096


class Group:
    """What is known of one group.

    refusal: (reason, retry_after_s) if its first sibling was rejected. arrived: siblings seen as attempt 0.
    live: siblings waiting or running. running: those running. replica_id: where its siblings go, while one runs.
    """

    __slots__ = ("arrived", "live", "refusal", "replica_id", "running", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrived = 0
        self.live = 0
        self.running = 0
        self.refusal: tuple[RejectReason, float | None] | None = None
        self.replica_id: ReplicaId | None = None


class GroupBook:
    """The groups with siblings alive or still to come. Requests that are alone (group_size 1) leave no trace.

    Groups whose missing siblings never come are forgotten, oldest first, when more than 4096 groups are kept.
    """

    def __init__(self) -> None:
        self._groups: dict[GroupId, Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def find(self, spec: RequestSpec) -> Group | None:
        """The group of a request, if it has siblings and one of them was seen."""
        return self._groups.get(spec.group_id) if spec.group_size > 1 else None

    def note_arrival(self, spec: RequestSpec, refusal: tuple[RejectReason, float | None] | None) -> None:
        """A sibling came for the first time and got its verdict."""
        if spec.group_size <= 1:
            return
        group = self._open(spec)
        if group.arrived == 0:
            group.refusal = refusal
        group.arrived += 1
        self._close_if_done(spec, group)

    def entered(self, spec: RequestSpec) -> None:
        """A sibling waits or runs now."""
        if spec.group_size > 1:
            self._open(spec).live += 1

    def left(self, spec: RequestSpec, *, was_running: bool) -> None:
        """A sibling neither waits nor runs any longer."""
        group = self.find(spec)
        if group is None:
            return
        group.live -= 1
        if was_running:
            group.running -= 1
        if group.running == 0:
            # The prefix may still be cached there, but nothing is worth waiting for a full replica any more.
            group.replica_id = None
        self._close_if_done(spec, group)

    def started(self, spec: RequestSpec, replica_id: ReplicaId) -> None:
        """A sibling runs now: the others follow the first one."""
        group = self.find(spec)
        if group is None:
            return
        group.running += 1
        if group.replica_id is None:
            group.replica_id = replica_id

    def audit(self, live: dict[GroupId, int]) -> None:
        """Check the counts of living siblings. Raises AssertionError."""
        counted = {group_id: group.live for group_id, group in self._groups.items() if group.live}
        assert counted == live, f"groups count {counted}, the requests say {live}"

    def _open(self, spec: RequestSpec) -> Group:
        group = self._groups.get(spec.group_id)
        if group is None:
            group = self._groups[spec.group_id] = Group(spec.group_size)
            self._forget_abandoned()
        return group

    def _close_if_done(self, spec: RequestSpec, group: Group) -> None:
        # A group met first as a resubmission never sees its first attempts arrive: its living siblings keep it.
        if group.live == 0 and (group.arrived == 0 or group.arrived >= group.size):
            del self._groups[spec.group_id]

    def _forget_abandoned(self) -> None:
        if len(self._groups) <= _MAX_ABANDONED:
            return
        for group_id, group in self._groups.items():
            if group.live == 0:
                del self._groups[group_id]
                return
