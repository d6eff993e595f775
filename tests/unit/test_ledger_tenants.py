"""What tenants asked for is counted when it arrives, once."""

from tempo_router.ledger import Ledger
from tests.builders import request, waiting


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
