"""Where the time of a run goes: seconds, share and tokens per second of each phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Phases:
    """Clocks that add up, one per phase; `with phases("update"): ...` runs one.

    seconds: of this round (a PPO iteration). total: of the rounds before it, since the process began.

    Args:
        wait: returns once the device has done its work (`Runtime.wait`); a GPU works on behind the clock's back.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self.tokens = 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Clock what is done inside."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def end_round(self, tokens: int) -> dict[str, float]:
        """The figures of a round in which `tokens` response tokens were sampled and learned from; starts the next.

        Returns:
            time/PHASE_s, its time/PHASE_share of all seconds, time/PHASE_tokens_per_s, and time/tokens_per_s of all.
        """
        spent = sum(self.seconds.values()) or 1e-9
        figures = {"time/tokens_per_s": tokens / spent}
        for name, seconds in self.seconds.items():
            figures |= {f"time/{name}_s": seconds, f"time/{name}_share": seconds / spent}
            figures[f"time/{name}_tokens_per_s"] = tokens / max(seconds, 1e-9)
            self.total[name] = self.total.get(name, 0.0) + seconds
        self.seconds, self.tokens = {}, self.tokens + tokens
        return figures

    def summary(self) -> str:
        """One line for the end of a run; "" if there was no round."""
        spent = sum(self.total.values())
        if not spent:
            return ""
        parts = (f"{k} {v / spent:.0%} ({self.tokens / max(v, 1e-9):,.0f} tokens/s)" for k, v in self.total.items())
        return f"{self.tokens / spent:,.0f} response tokens/s; time went to " + ", ".join(parts)

    def _now(self) -> float:
        self.wait()
        return time.perf_counter()
