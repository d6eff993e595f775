"""What is known of a program's shape before it unfolds: its client has said so, or has declared its graph."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownStage:
    """One stage of a program. calls: of the model, in all.

    Of each call, in tokens, None where nobody knows: prompt_tokens; output_tokens, as expected; max_tokens, the bound
    on the answer. gap_s: seconds that tools take before the stage; None where nobody knows.
    """

    stage: int
    calls: int = 1
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    gap_s: float | None = None
