"""How a request stands among the others, as last planned over all of them."""

from typing import NamedTuple


class Standing(NamedTuple):
    """What the last plan over the whole queue said of one request.

    density: expected value per GPU second still needed; all calls of a program share it. 0: worth nothing.
    is_admitted: the capacity timeline has room for it; otherwise it only fills what is spare.
    later_s: expected serial time of its program's stages after this one; 0 for a request alone.
    is_relegated: it can no longer meet its SLO.

    A tuple, because every plan makes thousands: a frozen dataclass takes four times as long to make.
    """

    density: float
    is_admitted: bool
    later_s: float = 0.0
    is_relegated: bool = False


UNRANKED = Standing(density=0.0, is_admitted=True)
"""Before the first plan, and for policies that do not plan."""
