"""How far the job is: a progress bar on a terminal, a line now and then in a log; and the counts behind both."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from deserve.batch import Completion
from deserve.report.sample import Sample
from deserve.report.startup import Startup
from deserve.timeline import History

LOG_EVERY_S = 10.0
SHOW_EVERY_S = 0.5  # on a terminal
RECENT_S = 5  # what "now" means
KEPT = 256  # requests whose lengths are remembered one by one
COUNTED = ("output_tokens", "trips", "input_tokens", "requests")  # by second
ADMITTED = {"admitted_tokens": "prompt_tokens", "admitted_cached_tokens": "cached_tokens"}  # totals of a `Sample`
SAMPLED = ("running", "waiting", "kv_use")  # states of a `Sample`


class Progress:
    """Counts requests and tokens as they come, from several threads, and shows them on `stream` (standard error)."""

    def __init__(self, total: int | None, warmup_s: float, stream: TextIO | None = None):
        self._total, self._warmup_s = total, warmup_s
        self._stream = stream or sys.stderr
        self._begin = self._shown = self._last_token_at = time.monotonic()
        self._history = {name: History() for name in (*COUNTED, *ADMITTED, *SAMPLED)}  # since the start
        self.sampler: Callable[[], Sample] | None = None
        self._sample, self._sampled_at = Sample(), -1
        self._counts: Counter[str] = Counter()
        self._warm: Counter[str] = Counter()  # as far as the warm-up is over
        self.answered: list[tuple[int, int, int]] = []  # line, prompt and answer (tokens) of the first requests
        self._errors: dict[str, dict[str, Any]] = {}  # by code: how many, and the first one's message
        self._finish_reasons: Counter[str] = Counter()  # of answers
        self.startup: Startup | None = None  # what came before the first token
        self.stragglers: Callable[[], str] = lambda: ""
        self._lock = threading.Lock()
        self._bar: Any = None

    def start(self) -> None:
        """The first visit begins: time counts from here."""
        self._begin = self._shown = self._last_token_at = time.monotonic()
        if self._stream.isatty():
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} requests, {postfix}"
            if self._total is None:
                shape = "{n_fmt} requests, {postfix}"
            self._bar = tqdm(total=self._total, file=self._stream, dynamic_ncols=True, bar_format=shape, leave=False)
        self._show()

    def tokens(self, count: int, trips: int) -> None:
        """`count` tokens were sampled, in so many `trips` of a sequence round the ring."""
        now = time.monotonic()
        second = int(now - self._begin)
        if second > self._sampled_at:
            with self._lock:
                self._look(second)
        if count:
            self._last_token_at = now
            if self.startup is not None and "first token" not in self.startup.seconds:
                self.startup.done("first token")
                print(f"deserve: first token {self.startup}", file=self._stream, flush=True)
            with self._lock:
                self._history["output_tokens"].add(second, count)
                self._history["trips"].add(second, trips)
                self._counts["sampled"] += count
                self._counts["trips"] += trips
                if now - self._begin >= self._warmup_s:
                    self._warm["output_tokens"] += count
        if now - self._shown > (LOG_EVERY_S if self._bar is None else SHOW_EVERY_S):
            self._shown = now
            self._show()

    def _look(self, second: int) -> None:
        """Note the scheduler's state in `second`; in those that were passed over it was as before."""
        if self.sampler is None or second < self._sampled_at:
            return
        before, self._sample = self._sample, self.sampler()
        for name, total in ADMITTED.items():
            self._history[name].add(second, getattr(self._sample, total) - getattr(before, total))
        for at in range(self._sampled_at + 1, second + 1):
            for name in SAMPLED:
                self._history[name].add(at, getattr(self._sample if at == second else before, name))
        self._sampled_at = second

    def request(self, *completions: Completion, error: tuple[str, str, str] | None = None) -> None:
        """A request was answered, by one or several `completions`, or got an `error`: custom_id, code and message."""
        now = time.monotonic()
        counts = Counter(requests=1, errors=int(error is not None))
        for completion in completions:
            if completion.request.choice % completion.request.sampling.n == 0:  # of each prompt, once
                counts["input_tokens"] += len(completion.request.prompt)
                counts["cached_tokens"] += completion.cached_tokens
        with self._lock:
            for name in ("requests", "input_tokens"):
                self._history[name].add(int(now - self._begin), counts[name])
            self._counts += counts
            if error is not None:
                custom_id, code, message = error
                of_code = self._errors.setdefault(code, {"count": 0, "first": message, "custom_id": custom_id})
                of_code["count"] += 1
            for completion in completions:
                request = completion.request
                self._counts["output_tokens"] += len(completion.tokens)
                self._counts["resumed_tokens"] += len(request.begun.tokens)
                self._finish_reasons[completion.finish_reason] += 1
                self._counts["max_output_tokens"] += request.sampling.max_tokens
                cut = completion.finish_reason == "length" and request.default_length
                self._counts["cut_by_default_max_tokens"] += cut
                if len(self.answered) < KEPT:
                    self.answered.append((request.line, len(request.prompt), len(completion.tokens)))
            if now - self._begin >= self._warmup_s:
                self._warm += counts

    @property
    def recorded(self) -> int:
        """Requests that have a line of results from this start."""
        return self._counts["requests"]

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start to the last token."""
        return self._last_token_at - self._begin

    def summary(self) -> dict[str, Any]:
        """The counts as `metrics.json` carries them.

        `output_tokens` are those of answered requests, `max_output_tokens` what these allowed,
        `cached_tokens` those of `input_tokens` that others had computed and `prefix_hit_rate` their share, and
        `cut_by_default_max_tokens` how many of them ended at `sampling.max_tokens`, stating no length. After the
        warm-up what counts is when a token was sampled and a request answered, whenever it began. `history` has an
        entry for each second: sums (`input_tokens` of requests answered in it, `admitted_tokens` of prompts admitted in
        it), but for `running`, `waiting` and `kv_use`, which are as they were.
        """
        elapsed = max(self.elapsed_s, 1e-9)
        return {
            **_rates(self._counts, elapsed),
            "cached_tokens": self._counts["cached_tokens"],
            "prefix_hit_rate": self._hit_rate,
            "max_output_tokens": self._counts["max_output_tokens"],
            "cut_by_default_max_tokens": self._counts["cut_by_default_max_tokens"],
            "finish_reasons": dict(self._finish_reasons),
            "errors_by_code": {code: dict(of_code) for code, of_code in self._errors.items()},
            "warmup_s": self._warmup_s,
            "after_warmup": _rates(self._warm, max(elapsed - self._warmup_s, 1e-9)),
            "history": {name: history.first(int(elapsed) + 1) for name, history in self._history.items()},
        }

    def now(self) -> dict[str, Any]:
        """The counts so far, and the last `Sample`. For any thread."""
        with self._lock:
            return {
                "requests": self._counts["requests"],
                "sampled": self._counts["sampled"],
                "trips": self._counts["trips"],
                "finish_reasons": dict(self._finish_reasons),
                "errors": {code: of_code["count"] for code, of_code in self._errors.items()},
                "sample": self._sample,
                "total": self._total,
            }

    @property
    def _hit_rate(self) -> float:
        return self._counts["cached_tokens"] / max(1, self._counts["input_tokens"])

    def close(self) -> None:
        """Show the end and leave the terminal tidy. The scheduler must be at rest."""
        self._look(max(0, self._sampled_at, int(self.elapsed_s)))
        if self._bar is not None:
            self._bar.close()
        else:
            self._show()

    def _show(self) -> None:
        elapsed = time.monotonic() - self._begin
        with self._lock:
            second = int(elapsed)
            recent = sum(self._history["output_tokens"][max(0, second - RECENT_S) : second])
            done, sampled, hit_rate = self._counts["requests"], self._counts["sampled"], self._hit_rate
            answered = self._counts["output_tokens"]
            a_trip = sampled / max(1, self._counts["trips"])
        overall = sampled / max(elapsed, 1e-9)
        now = recent / min(second, RECENT_S) if second else overall
        words = [f"{now:,.0f} tok/s now", f"{overall:,.0f} overall"]
        if self._total and done and done < self._total:
            to_come = self._total * answered / done - sampled  # if answers stay as long as they were
            if to_come > 0 and sampled > 0:  # else only answers longer than those are left, and nobody knows
                words.append(f"{clock(to_come / overall)} left")
        if hit_rate:
            words.append(f"{hit_rate:.0%} of prompt tokens shared")
        if a_trip >= 1.01:
            words.append(f"{a_trip:.2f} tokens a trip")
        text = ", ".join(filter(None, [*words, self.stragglers()]))
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text)
        else:
            total = "" if self._total is None else f"/{self._total}"
            print(f"deserve: {done}{total} requests, {text}", file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """`seconds` as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rates(counts: Counter[str], elapsed_s: float) -> dict[str, float]:
    output = counts["output_tokens"] - counts["resumed_tokens"]  # the others were sampled by earlier starts
    return {
        **{name: counts[name] for name in ("requests", "errors", "input_tokens", "output_tokens")},
        "elapsed_s": elapsed_s,
        "output_tokens_per_s": output / elapsed_s,
        "total_tokens_per_s": (counts["input_tokens"] + output) / elapsed_s,
    }
