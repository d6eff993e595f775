"""Values of command-line options, for `type=` of argparse: what is out of range is said in one line."""

import argparse
import math

MAX_COUNT = 1_000_000
"""No option counts more things than this; a larger number is a slip of the finger."""


def above_zero(text: str) -> float:
    """A finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above zero")
    return number


def at_least_one(text: str) -> int:
    """A whole number from 1 to MAX_COUNT."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above zero")
    if int(text) > MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at most {MAX_COUNT}")
    return int(text)


def whole(text: str) -> int:
    """A whole number, zero or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, not below zero")
    return int(text)
