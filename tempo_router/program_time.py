"""How long a program still takes, and its chance to be in time: the same for the plan and for who asks.

The formulas take numbers and arrays alike.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tempo_router.program_history import ATOMS, SPREAD, Forecast
from tempo_router.step_time import Pace
from tempo_router.value import PREFILL_WALL_RATIO

Floats = npt.NDArray[np.float64]
Amount = TypeVar("Amount", float, Floats)

SPREAD_S = 0.3
"""Standard deviation of the time that a program needs: SPREAD of it, and so many seconds."""

_UNSEEN_SHARE = 0.5
"""Of the time left that a program is believed to take where nobody went before it: a client that sets a deadline leaves
about as much slack as work. Without it the first programs look short, and twice as many are begun as can be ended."""

_UNSEEN_GAPS = 0.25
"""Of that time, what tools and prompts take; the rest is decoding."""

_UNSURE = 1.5
"""Factor on what work is believed to take while the step-time model is far off."""


def margin_of(pace: Pace) -> float:
    """Factor on what work takes by this pace."""
    return _UNSURE if pace.is_unsure else 1.0


def unseen(unknown: Amount, left_s: Amount, tau_s: float) -> tuple[Amount, Amount]:
    """(tokens, seconds of tools) of what nobody went through before. unknown: probability to get there.

    left_s: until the deadline, not below zero. tau_s: between two tokens.
    """
    unseen_s = _UNSEEN_SHARE * unknown * left_s
    return (1.0 - _UNSEEN_GAPS) * unseen_s / tau_s, _UNSEEN_GAPS * unseen_s


def serial_s(
    chain_tokens: Amount, chain_prompt_tokens: Amount, gaps_s: Amount, stages: Amount, pace: Pace, wait_s: float
) -> Amount:
    """Serial seconds of stages to come: their longest calls and prompts, tools, and a wait and a step for each."""
    tau_s = margin_of(pace) * pace.tau_s
    prefill_s = PREFILL_WALL_RATIO * (chain_prompt_tokens * pace.prefill_token_s)
    return chain_tokens * tau_s + prefill_s + gaps_s + stages * wait_s + stages * tau_s


def deviations(different: Sequence[Forecast], of_unit: Sequence[int]) -> Floats:
    """By how many tokens the longest answers to come may differ from their mean: (units, atoms), or (units, 1)."""
    if not any(one.chain_atoms for one in different):
        return np.zeros((len(of_unit), 1))
    rows = [
        [atom - one.chain_tokens for atom in one.chain_atoms] if one.chain_atoms else [0.0] * ATOMS for one in different
    ]
    found: Floats = np.array(rows, dtype=np.float64)[of_unit]
    return found


def chances(left_s: Floats, needed_s: Floats, longer_s: Floats) -> Floats:
    """Probability of each program to be in time, (units,).

    left_s: until the deadline. needed_s: as expected. longer_s: (units, atoms), by how much it may be more; each case
    as likely as the others, and each with the spread of any estimate around it.
    """
    with np.errstate(invalid="ignore"):
        needed_s = np.maximum(needed_s[:, None] + longer_s, 0.0)
        z = (left_s[:, None] - needed_s) / (SPREAD * needed_s + SPREAD_S)
        chance: Floats = _normal(z).mean(axis=1)
    return chance


def _normal(z: Floats) -> Floats:
    """Distribution function of the standard normal, to three digits."""
    return 0.5 * (1.0 + np.tanh(0.7978845608 * (z + 0.044715 * z**3)))
