"""How long a start takes, step by step."""

import time


class Startup:
    """The seconds of each step, in their order, from `begun` (as `time.time` has it; None: now)."""

    def __init__(self, begun: float | None = None):
        self._last = time.time() if begun is None else begun
        self.seconds: dict[str, float] = {}

    def done(self, step: str, **parts: float) -> None:
        """`step` has ended; the seconds of its `parts` count apart."""
        now = time.time()
        self.seconds[step] = now - self._last - sum(parts.values())
        self.seconds |= parts
        self._last = now

    def __str__(self) -> str:
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in self.seconds.items() if seconds >= 0.05)
        return f"{sum(self.seconds.values()):.1f} s after the start ({steps})"
