"""What of an installed library is not as we need it, on classes made up here."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest
import structlog

from tempo_router.errors import EngineVersionError
from workers.vllm_check import attribute_differences, check_version, contract_differences, signature_differences


class Base:
    def __init__(self) -> None:
        self.inherited: int = 0


@dataclass
class Engine(Base):
    declared: int

    def __post_init__(self) -> None:
        self.kept = self.kept_too = 1

    def step(self, tokens, *, is_last=False) -> None:
        steps = Base()
        steps.elsewhere = 1  # type: ignore[attr-defined]

    @property
    def asked(self) -> int:
        return self.kept


class Queue(ABC):
    @abstractmethod
    def add(self, request) -> None: ...

    @abstractmethod
    def find(self, request_id) -> None: ...

    def is_empty(self) -> bool:
        return True


class OwnQueue:
    def add(self, request, place) -> None: ...


def test_methods_that_changed_are_named_with_both_their_parameters():
    relied_on = (
        (Engine, "step", ("self", "tokens", "is_last")),
        (Engine, "step", ("self", "tokens")),
        (Engine, "leap", ("self",)),
    )
    assert signature_differences(relied_on) == [
        "Engine.step takes (self, tokens, is_last), not (self, tokens)",
        "Engine.leap does not exist",
    ]


def test_an_attribute_is_there_if_class_bases_or_methods_have_it():
    assert attribute_differences([(Engine, ("inherited", "declared", "kept", "kept_too", "asked", "step"))]) == []
    assert attribute_differences([(Engine, ("elsewhere", "keep"))]) == ["Engine has no elsewhere", "Engine has no keep"]


def test_only_what_is_abstract_is_asked_of_our_class():
    assert contract_differences(Queue, OwnQueue) == [
        "Queue.add takes (self, request), OwnQueue's (self, request, place)",
        "Queue asks for find, which OwnQueue does not have",
    ]


@pytest.mark.parametrize(("version", "warned"), [("0.32.0", []), ("0.32.0+cpu", []), ("0.33.0", ["vllm_untested"])])
def test_a_version_in_which_all_fits_is_used_and_said_to_be_untested(version, warned):
    with structlog.testing.capture_logs() as logs:
        check_version(version, [], needed_for="a worker")
    assert [entry["event"] for entry in logs] == warned


def test_a_version_that_lacks_something_is_refused_with_all_that_it_lacks():
    with pytest.raises(EngineVersionError, match=r"vLLM 0\.33\.0 is not as a worker needs it: one; other; install"):
        check_version("0.33.0", ["one", "other"], needed_for="a worker")
