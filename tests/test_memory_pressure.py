"""Short memory changes how long a job takes, never what it answers."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model, reference_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deserve.batch import Completion, Request, SamplingParams, VisitResult
from deserve.config import load_config
from deserve.layout import Layout
from deserve.model.checkpoint import Checkpoint, resolve
from deserve.scheduler.drafts import Drafts
from deserve.scheduler.pages import Pages
from deserve.scheduler.policy import POLICIES
from deserve.scheduler.scheduler import Scheduler
from deserve.stage import load_stage

OUTPUT = 24  # tokens of the reference; a shorter output is its beginning
STEM = 24  # tokens that half of the prompts begin with, as far as they go
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 20, 25, 31, 33, 40, 47, 60]


class Queue:
    """A request source that holds them all."""

    def __init__(self, requests: list[Request]):
        self._requests = deque(requests)

    def poll(self) -> Request | None:
        return self._requests.popleft() if self._requests else None

    @property
    def exhausted(self) -> bool:
        return not self._requests


@dataclass(frozen=True)
class Reference:
    """A model, and its greedy continuations of some prompts by transformers."""

    checkpoint: Checkpoint
    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2)
    model = reference_model(folder)
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, 256, length).tolist() for length in LENGTHS]
    for prompt in prompts[1::2]:
        prompt[:STEM] = prompts[-1][: len(prompt)][:STEM]
    outputs = [list(reference_tokens(model, prompt, OUTPUT)) for prompt in prompts]
    assert len({token for output in outputs for token in output}) > 50, "outputs that hardly depend on the prompt"
    return Reference(resolve(load_config([f"model.path={folder}"]).model), prompts, outputs)


@pytest.fixture(scope="module", autouse=True)
def shared_pages_are_read_once() -> Iterator[None]:
    """However few pages that saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deserve.model.backend.torch.SHARED_PAGES", 1)
        yield


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_answers_do_not_depend_on_memory(data: st.DataObject, reference: Reference) -> None:
    page_size = data.draw(st.sampled_from([1, 2, 4, 16]), "page size")
    swap = data.draw(st.integers(0, 60 // page_size), "swap pages")
    main = data.draw(st.integers(1 if swap else 2, 100 // page_size), "main pages")
    plan = Layout(
        partition=(0,),
        rounds=data.draw(st.integers(1, 4), "rounds"),
        micro_batch_size=data.draw(st.integers(1, 6), "micro-batch size"),
        concurrency=data.draw(st.integers(1, 16), "concurrency"),
        max_batch_tokens=data.draw(st.sampled_from([1, 7, 16, 64]), "token budget"),
        policy=data.draw(st.sampled_from(sorted(POLICIES)), "policy"),
        page_size=page_size,
        main_pages=main,
        swap_pages=swap,
        host_height=data.draw(st.integers(0, 9), "buddy height"),
    )
    lengths = data.draw(
        st.lists(st.tuples(st.integers(0, len(LENGTHS) - 1), st.integers(1, OUTPUT)), min_size=6, max_size=14)
    )
    requests = [
        Request(
            f"{index}", np.array(reference.prompts[index], np.int32), SamplingParams(max_tokens=count, ignore_eos=True)
        )
        for index, count in lengths
        if -(-(len(reference.prompts[index]) + count - 1) // page_size) <= main + swap
    ]
    gathers = data.draw(st.booleans(), "gathers")
    grouped = data.draw(st.booleans(), "grouped")
    drafts = data.draw(st.sampled_from([0, 1, 5]), "draft tokens")
    scheduler = Scheduler(
        plan,
        Queue(requests),
        cycle_s=(lambda rounds, rows: rounds) if gathers else None,
        share_prefixes=data.draw(st.booleans(), "share prefixes"),
        grouped=grouped,
        drafter=Drafts(plan.concurrency, fixed=drafts) if drafts else None,
    )
    pages = scheduler.pages
    stage = load_stage(reference.checkpoint, plan, plan.shard(0, 2), torch.float32, torch.device("cpu"))
    completions: list[Completion] = []
    turn = deque((index, np.zeros(0, np.int32)) for index in range(plan.rounds))
    while turn:
        micro_batch, tokens = turn.popleft()
        completions += scheduler.commit(micro_batch, VisitResult(tokens))
        step, ids = scheduler.plan(micro_batch)
        sampled = stage.forward(step, torch.from_numpy(ids)).numpy()
        check_ownership(scheduler, pages)
        if not step.retires:
            turn.append((micro_batch, sampled))
        stage.end_visit(turn[0][0] if turn else None)
    assert pages.all_free
    counters = scheduler.counters  # whose prefix is evicted meanwhile is computed again
    assert counters.resumptions == counters.suspensions or (pages.prefixes.evicted and counters.recomputed_tokens)
    assert len(completions) == len(requests)
    for completion in completions:
        expected = reference.outputs[int(completion.request.custom_id)][: completion.request.sampling.max_tokens]
        assert completion.tokens.tolist() == expected


def check_ownership(scheduler: Scheduler, pages: Pages) -> None:
    """No page but a prefix page is owned twice, and none is lost."""
    main_owned = []
    for micro_batch, batch in enumerate(scheduler.micro_batches):
        owned = np.concatenate([pages.owned(slot) for slot in batch.slots] or [np.zeros(0, np.int32)])
        swap = owned[owned >= pages.main]
        assert len(np.unique(swap)) == len(swap)
        main_owned.append(owned[owned < pages.main])
        assert len(swap) + pages.free_swap(micro_batch) == pages.swap, batch
    main, readers = np.unique(np.concatenate(main_owned), return_counts=True)
    assert pages.prefixes.held[main[readers > 1]].all()
    assert len(main) + pages.free_main == pages.main
