"""Starting again: what was answered is passed over unread, and what was counted is answered or said to be missing."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results import code, read_results

import deserve.run
from deserve.comm.host import Host
from deserve.comm.world import World
from deserve.config import Config, load_config
from deserve.errors import LastingError, UserError
from deserve.planner.survey import survey
from deserve.run import host_awaited, require_results, run, seconds_left
from deserve.workload import Answered, Item, Limits, open_workload

LIMITS = Limits(vocab_size=320, max_context=100)


class Unused:
    """A tokenizer that nobody may call."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError(text)

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        raise AssertionError(messages)


def items(source: Path | str, done: set[str], tokenizer: Any = None, path: Path | None = None) -> list[Item]:
    config = Config()
    config.workload.source, config.workload.path = str(source), path and str(path)
    config.sampling.max_tokens = 4
    return list(open_workload(config, tokenizer, LIMITS, done=done))


def test_answered_lines_are_not_tokenised(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "hello"}]}
    lines = [
        {"custom_id": "first", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"prompt": "hello", "custom_id": "last"},
        {"prompt": 'a "custom_id": in the text', "custom_id": 'quo"ted'},
        {"prompt": "hello"},
        {"prompt": "hello", "custom_id": None},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = ["first", "last", 'quo"ted', "line-4", "line-5"]
    assert items(source, set(ids), Unused()) == [Answered(custom_id) for custom_id in ids]


def test_answered_requests_of_other_sources(tmp_path: Path) -> None:
    assert items("fixed3:5:0", {"fixed-0", "fixed-2"})[::2] == [Answered("fixed-0"), Answered("fixed-2")]
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "hello"}]}]))
    assert items("sharegpt", {"sharegpt-0-0"}, Unused(), path) == [Answered("sharegpt-0-0")]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "line-1", "line-3", "é", None]), st.integers(0, 3)), max_size=8),
    st.data(),
)
def test_what_is_left_is_as_in_one_start(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str | None, int]], data: st.DataObject
) -> None:
    """Whatever ids repeat, and whatever was answered: the rest comes as if it were read for the first time."""
    source = tmp_path_factory.mktemp("lines") / "in.jsonl"
    with source.open("w") as file:
        for custom_id, form in lines:
            named = {} if custom_id is None else {"custom_id": custom_id}
            entry = {"prompt": [1, 2, 3]}
            file.write(json.dumps(named | entry if form % 2 else entry | named, ensure_ascii=form > 1) + "\n")
    whole = items(source, set())
    done = data.draw(st.sets(st.sampled_from([item.custom_id for item in whole]))) if whole else set()
    again = items(source, done)
    assert [item.custom_id for item in again] == [item.custom_id for item in whole]
    assert [type(item) is Answered or item.custom_id in done for item in again] == [i.custom_id in done for i in whole]
    assert str([item for item in again if item.custom_id not in done]) == str(
        [item for item in whole if item.custom_id not in done]
    )


def test_the_time_limit_counts_from_the_first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config, world, now = Config(), World(), 100.0
    monkeypatch.setattr("time.time", lambda: now)
    assert seconds_left(config, world) is None
    config.time_limit_s = 10
    assert seconds_left(config, world) == 10
    now = 103.0
    assert seconds_left(config, world) == 7


class Board:
    """A world of `size` ranks, seen from rank 0, whose notes outlive it."""

    rank, hosts = 0, [Host("boot", "here")]

    def __init__(self, size: int, notes: dict[str, str]):
        self.size, self._notes = size, notes

    def note(self, key: str) -> str | None:
        return self._notes.get(key)

    def leave_note(self, key: str, text: str) -> None:
        self._notes[key] = text

    def share(self, key: str, value: Any) -> Any:
        return value


def test_a_host_is_awaited_where_the_others_cannot_hold_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, notes, now = Config(), {}, 100.0
    config.elastic.wait_s = 30
    monkeypatch.setattr("time.time", lambda: now)
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def plan(size: int, fits: bool) -> None:
        with host_awaited(config, Board(size, notes)):
            if not fits:
                raise UserError("out of memory")

    with pytest.raises(UserError, match=r"^out of memory$"):  # nobody has left
        plan(3, fits=False)
    plan(3, fits=True)
    for began, left in ((200.0, 30.0), (220.0, 10.0), (240.0, 0.0)):  # torchrun has started the ranks again meanwhile
        now = began
        with pytest.raises(UserError, match=r"2 ranks are left, and no host came back within .*=30: out of"):
            plan(2, fits=False)
        assert waited.pop() == left
        assert "2 ranks are left: out of memory. Waiting for a host" in capsys.readouterr().err
    plan(3, fits=True)
    now = 1000.0
    with pytest.raises(UserError):
        plan(2, fits=False)
    assert waited == [30.0]


def test_results_stay_with_rank_0(tmp_path: Path) -> None:
    config = Config()
    config.output.dir = str(tmp_path)
    require_results(config, "here", Board(2, {}))
    with pytest.raises(UserError, match=r"rank 0 was on there and is on here now, where output.dir=.* has no results"):
        require_results(config, "there", Board(2, {}))
    (tmp_path / "manifest.json").touch()
    require_results(config, "there", Board(2, {}))


def test_a_stop_holds_while_the_hosts_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun stops the ranks when a host comes, and starts them again with it; its folder of logs keeps the notes."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    World().leave_note("began/out/put", "1")
    assert World().note("began/out/put") == "1"
    world = World()
    assert not world.stop_announced
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    world.announce_stop()
    assert world.stop_announced
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert not world.stop_announced


def write_prompts(source: Path, names: str) -> None:
    """A prompt of 4 tokens for each name, of 40 for a capital letter."""
    lines = [{"custom_id": name, "prompt": [5] * (40 if name.isupper() else 4), "ignore_eos": True} for name in names]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(autouse=True, scope="module")
def surveyed_once() -> Iterator[None]:
    """All jobs of this file run on one machine."""
    found: list[Any] = []

    def survey_once(*arguments: Any) -> Any:
        if not found:
            found.append(survey(*arguments))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deserve.run, "survey", survey_once)
        yield


def start(tmp_path: Path, *overrides: str) -> int:
    """A job in this process."""
    job = ["model=tiny", "device=cpu", f"workload.source={tmp_path}/in.jsonl", "sampling.max_tokens=4", *overrides]
    return run(load_config([*job, f"output.dir={tmp_path}/out"]), World())


def results(tmp_path: Path) -> list[tuple[str, str | None]]:
    return [(entry["custom_id"], code(entry)) for entry in read_results(tmp_path / "out")]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ("abc", r"9 requests were counted, and 3 have results: 6 are missing\. .*in\.jsonl was changed while the job"),
        ("abcdefgxi", r"in\.jsonl was changed while the job ran, so results may answer lines"),
        ("abcdefghijk", None),
    ],
)
def test_an_input_that_changes_under_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str, message: str | None
) -> None:
    survey_once: Callable[..., Any] = deserve.run.survey
    write_prompts(tmp_path / "in.jsonl", "abcdefghi")

    def survey_and_change(*arguments: Any) -> Any:
        write_prompts(tmp_path / "in.jsonl", now)
        return survey_once(*arguments)

    monkeypatch.setattr(deserve.run, "survey", survey_and_change)
    if message is None:  # lines that were appended are for the next start
        assert start(tmp_path) == 0
        assert sorted(name for name, _ in results(tmp_path)) == list("abcdefghi")
        return
    with pytest.raises(LastingError, match=message):
        start(tmp_path)
    assert sorted(name for name, _ in results(tmp_path)) == sorted(now)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["requests"] == len(now)


def test_an_error_that_no_restart_mends_is_what_restarts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the restarted ranks would say of the input in its new state."""
    world, said = World(), []

    def fail(message: str) -> NoReturn:
        said.append(message)
        raise SystemExit(1)

    monkeypatch.setattr(world, "fail", fail)
    with pytest.raises(SystemExit):
        world.end_with(LastingError("six are missing"))
    monkeypatch.setattr(deserve.run, "World", lambda timeout_s: world)
    monkeypatch.setattr(sys, "argv", ["deserve.run", "model=tiny"])
    with pytest.raises(SystemExit):
        deserve.run.main()
    assert said == ["six are missing"] * 2


def test_a_larger_plan_and_a_longer_input_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["kvcache.main_pages=2", "kvcache.swap_pages=0"]
    write_prompts(tmp_path / "in.jsonl", "Aab")
    assert start(tmp_path, *small) == 0
    assert sorted(results(tmp_path)) == [("A", "kv_memory_exceeded"), ("a", None), ("b", None)]
    write_prompts(tmp_path / "in.jsonl", "AabB")
    assert start(tmp_path, *small) == 0
    assert results(tmp_path)[3:] == [("B", "kv_memory_exceeded")]  # the same error is not written again
    capsys.readouterr()
    assert start(tmp_path) == 0
    assert sorted(results(tmp_path)[4:]) == [("A", None), ("B", None)]
    said = capsys.readouterr().out
    assert "2 requests had results from earlier starts, and 2 errors of earlier starts were tried again" in said
    assert ", 2 in flight," in said  # the plan is for what is left
