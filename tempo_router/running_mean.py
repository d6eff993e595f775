"""A mean that is right from the first value on and forgets later."""


class RunningMean:
    """Of all values while there are few, then of about the last 1 / `least_weight`.

    least_weight: weight of a new value, at least; 0 < least_weight <= 1. value: 0 before the first one. count: of all.
    """

    __slots__ = ("_least_weight", "count", "value")

    def __init__(self, least_weight: float) -> None:
        self._least_weight = least_weight
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self.count += 1
        self.value += max(1.0 / self.count, self._least_weight) * (value - self.value)
