"""What tenants asked for is counted when it arrives, once."""

from dataclasses import replace

from tempo_router.ledger import Ledger
from tempo_router.request import DispatchId, ProgramCall, ProgramId
from tests.builders import CHAT, produced, request, running, waiting


def test_what_a_tenant_offers_counts_once_whatever_is_served_of_it():
    ledger = Ledger()
    first = waiting(request("a", prompt_tokens=100))
    ledger.arrived(first)
    account = ledger.tenant(first.spec)
    assert account is not None
    assert account.offered == 100 + 2 * first.lengths.mean
    ledger.left(first.spec)
    ledger.arrived(waiting(request("a", prompt_tokens=100, attempt=1)))
    assert account.offered == 100 + 2 * first.lengths.mean


def test_the_tokens_of_a_step_count_as_if_each_call_had_told_its_own():
    books = Ledger(), Ledger()
    specs = []
    for number in range(12):
        slo = ProgramCall(ProgramId(f"p{number % 2}"), 60.0) if number % 3 else CHAT
        specs.append(replace(request(f"r{number}", slo=slo), tenant=f"t{number % 4}"))
    for book in books:
        for spec in specs:
            book.arrived(waiting(spec))
    for number, spec in enumerate(specs):
        produced(books[0], spec, number)
    calls = [running(spec) for spec in specs]
    calls[5].is_aborted = True
    books[1].progressed(
        [*calls[:5], None, *calls[5:]], [(DispatchId(0), number) for number in (0, 1, 2, 3, 4, 99, *range(5, 12))]
    )
    produced(books[1], specs[5], 5)

    one_by_one, at_once = (
        (
            {name: (tenant.counter, tenant.served) for name, tenant in book.tenants.items()},
            {name: program.attained_tokens for name, program in book.programs.items()},
        )
        for book in books
    )
    assert at_once == one_by_one
    assert all(served > 0 for _, served in at_once[0].values())
