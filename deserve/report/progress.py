"""How far the job is: a progress bar on a terminal, a line now and then in a log; and the counts behind both."""

import sys
import threading
import time

from tqdm import tqdm

from deserve.batch import Completion

LOG_EVERY_S = 10.0


class Progress:
    """Counts requests and tokens as they come, from several threads, and shows them."""

    def __init__(self, total: int | None, warmup_s: float):
        self.requests = self.errors = self.input_tokens = self.output_tokens = 0
        self.history: list[int] = []  # output tokens of each second since the start
        self._warmup_s = warmup_s
        self._begin = self._shown = time.monotonic()
        self._sampled = 0
        self._last_token_at = self._begin
        self._warm_tokens = 0
        self._lock = threading.Lock()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="req", dynamic_ncols=True, smoothing=0.1)
        self._total = total

    def start(self) -> None:
        """The first visit begins: time counts from here."""
        self._begin = self._shown = self._last_token_at = time.monotonic()

    def tokens(self, count: int) -> None:
        """`count` tokens were sampled."""
        now = time.monotonic()
        if count:
            self._sampled += count
            self._last_token_at = now
            second = int(now - self._begin)
            self.history.extend([0] * (second + 1 - len(self.history)))
            self.history[second] += count
            if now - self._begin < self._warmup_s:
                self._warm_tokens += count
        if now - self._shown > (0.5 if self._bar is not None else LOG_EVERY_S):
            self._shown = now
            self._show()

    def request(self, completion: Completion | None = None, error: bool = False) -> None:
        """A request was answered (`completion`) or refused."""
        with self._lock:
            self.requests += 1
            self.errors += error
            if completion is not None:
                self.input_tokens += len(completion.request.prompt)
                self.output_tokens += len(completion.tokens)

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start to the last token."""
        return self._last_token_at - self._begin

    def summary(self) -> dict[str, float]:
        """The counts as `metrics.json` carries them."""
        elapsed = max(self.elapsed_s, 1e-9)
        after = max(elapsed - self._warmup_s, 1e-9)
        return {
            "requests": self.requests,
            "errors": self.errors,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "elapsed_s": elapsed,
            "output_tokens_per_s": self.output_tokens / elapsed,
            "total_tokens_per_s": (self.input_tokens + self.output_tokens) / elapsed,
            "after_warmup_output_tokens_per_s": (self._sampled - self._warm_tokens) / after,
        }

    def close(self) -> None:
        """Show the end and leave the terminal tidy."""
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        recent = self.history[-6:-1] or self.history
        now_rate = sum(recent) / max(len(recent), 1)
        rate = self._sampled / max(time.monotonic() - self._begin, 1e-9)
        text = f"{now_rate:,.0f} tok/s now, {rate:,.0f} overall"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(self.requests - self._bar.n)
            self._bar.refresh()
        else:
            total = "" if self._total is None else f"/{self._total}"
            print(f"deserve: {self.requests}{total} requests, {text}", file=sys.stderr, flush=True)
