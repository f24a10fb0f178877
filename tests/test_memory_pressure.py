"""Short memory changes how long a job takes, never what it answers."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model, reference_tokens, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deserve.batch import Completion, Request, Rules, SamplingParams, VisitPlan, VisitResult
from deserve.config import load_config
from deserve.draft_model import DraftMemory, DraftModel
from deserve.layout import Layout
from deserve.model.checkpoint import Checkpoint, resolve
from deserve.model.grammar import checked_grammar
from deserve.scheduler.drafts import Drafts
from deserve.scheduler.forced import Forced
from deserve.scheduler.pages import Pages
from deserve.scheduler.policy import POLICIES
from deserve.scheduler.rounds import Counters
from deserve.scheduler.scheduler import Scheduler
from deserve.scheduler.sliding import most_sliding
from deserve.stage import guide, load_stage

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
    outputs: dict[bool, list[list[int]]]  # by whether pages are in fp8: then by this program, with memory for all


# Layers with swap pages, which take each other's place, before and behind others
WINDOW = 9
TYPES = [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full")]
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": TYPES, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(make_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", **SLIDING))


def make_reference(folder: Path) -> Reference:
    model = reference_model(folder)
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, 256, length).tolist() for length in LENGTHS]
    for prompt in prompts[1::2]:
        prompt[:STEM] = prompts[-1][: len(prompt)][:STEM]
    outputs = [list(reference_tokens(model, prompt, OUTPUT)) for prompt in prompts]
    assert len({token for output in outputs for token in output}) > 50, "outputs that hardly depend on the prompt"
    checkpoint = resolve(load_config([f"model.path={folder}"]).model)
    count = len(prompts)
    plan = Layout((0,), 1, count, count, 2048, "prefill_first", 16, 16 * count, 0, 1, fp8_pages=True)
    requests = [
        Request(f"{index}", np.array(prompt, np.int32), SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
        for index, prompt in enumerate(prompts)
    ]
    completions = completed(Scheduler(plan, Queue(requests), share_prefixes=False), plan, checkpoint)
    coded = [completion.tokens.tolist() for completion in sorted(completions, key=by_id)]
    alike = [one[0] == other[0] for one, other in zip(coded, outputs, strict=True)]
    assert coded != outputs and sum(alike) > count / 2, "rounded, and not broken"
    return Reference(checkpoint, prompts, {False: outputs, True: coded})


def by_id(completion: Completion) -> int:
    return int(completion.request.custom_id)


@pytest.fixture(scope="module", autouse=True)
def shared_pages_are_read_once() -> Iterator[None]:
    """However few pages that saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deserve.model.backend.torch.SHARED_PAGES", 1)
        yield


@settings(max_examples=70)
@given(data=st.data())
def test_answers_do_not_depend_on_memory(data: st.DataObject, reference: Reference) -> None:
    check_answers(data, reference)


@settings(max_examples=25)
@given(data=st.data())
def test_nor_on_which_pages_windows_have_left(data: st.DataObject, sliding: Reference) -> None:
    check_answers(data, sliding, WINDOW)


def check_answers(data: st.DataObject, reference: Reference, window: int = 0) -> None:
    page_size = data.draw(st.sampled_from([1, 2, 4, 16]), "page size")
    swap = data.draw(st.integers(0, 60 // page_size), "swap pages")
    main = data.draw(st.integers(1 if swap else 2, 100 // page_size), "main pages")
    plan = Layout(
        partition=(0,),
        rounds=data.draw(st.integers(1, 4), "rounds"),
        micro_batch_size=data.draw(st.integers(1, 6), "micro-batch size"),
        concurrency=data.draw(st.integers(1, 16), "concurrency"),
        max_batch_tokens=(budget := data.draw(st.sampled_from([1, 7, 16, 64]), "token budget")),
        policy=data.draw(st.sampled_from(sorted(POLICIES)), "policy"),
        page_size=page_size,
        main_pages=main,
        swap_pages=swap,
        host_height=data.draw(st.integers(0, 9), "buddy height"),
        fp8_pages=not window and data.draw(st.booleans(), "fp8 pages"),
    )
    if window:
        spare = most_sliding(window, page_size) + budget // page_size
        plan = replace(plan, window=window, sliding_pages=spare + data.draw(st.integers(0, 40), "sliding pages"))
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
    completions = completed(scheduler, plan, reference.checkpoint)
    assert len(completions) == len(requests)
    wrong = [
        completion
        for completion in completions
        if completion.tokens.tolist()
        != reference.outputs[plan.fp8_pages][by_id(completion)][: completion.request.sampling.max_tokens]
    ]
    # The last bit of a float32, which who shares a visit decides, now and then decides on an fp8 code.
    assert len(wrong) <= 2 * plan.fp8_pages, wrong


def completed(scheduler: Scheduler, plan: Layout, checkpoint: Checkpoint, requeues: int = 0) -> list[Completion]:
    """Run all that `scheduler` has on one rank, and check its pages after each visit.

    Before one in `requeues` visits, a sequence of the round is requeued; 0: never.
    """
    visits = 0
    pages = scheduler.pages
    shard = plan.shard(0, checkpoint.config.num_layers)
    stage = load_stage(checkpoint, plan, shard, torch.float32, torch.device("cpu"))
    completions: list[Completion] = []
    under_way: dict[int, VisitPlan] = {}
    turn = deque((index, np.zeros(0, np.int32)) for index in range(plan.rounds))
    while turn:
        micro_batch, tokens = turn.popleft()
        if micro_batch in under_way:
            last = under_way[micro_batch]
            completions += scheduler.commit(micro_batch, VisitResult.decode(tokens, last.sampled, last.scored))
        visits += 1
        if requeues and visits % requeues == 0 and len(slots := scheduler.micro_batches[micro_batch].slots):
            scheduler.rounds.requeue(micro_batch, int(slots[visits % len(slots)]))
        step, ids = scheduler.plan(micro_batch)
        under_way[micro_batch] = step
        sampled = stage.forward(step, torch.from_numpy(ids)).numpy()
        check_ownership(scheduler, pages)
        if not step.retires:
            turn.append((micro_batch, sampled))
        stage.end_visit(turn[0][0] if turn else None)
    assert pages.all_free
    counters = scheduler.counters  # whose prefix is evicted meanwhile is computed again
    assert counters.resumptions == counters.suspensions or (pages.prefixes.evicted and counters.recomputed_tokens)
    return completions


@pytest.mark.parametrize(("fixed", "memory"), [(4, 10**8), (3, 600_000), (None, 10**8)])
def test_a_model_that_makes_drafts_for_itself(fixed: int | None, memory: int, reference: Reference) -> None:
    """Nearly all are right, what short memory does to sequences or to the drafts' own pages notwithstanding."""
    room = Layout((0,), 3, 4, 12, 16, "decode_first", 2, main_pages=90, swap_pages=6, host_height=11)
    requests = [
        Request(f"{index}", np.array(prompt, np.int32), SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
        for index, prompt in enumerate(reference.prompts)
    ]
    vocab = reference.checkpoint.config.vocab_size
    of_drafts = DraftMemory.within(reference.checkpoint, memory, room.page_size, torch.float32)
    model = DraftModel(of_drafts, room, vocab, torch.float32, torch.device("cpu"))
    drafts = Drafts(room.concurrency, lambda *load: 1.0 + 1e-3 * sum(load[3:4]), fixed, model=model)
    scheduler = Scheduler(room, Queue(requests), share_prefixes=True, drafter=drafts)
    completions = completed(scheduler, room, reference.checkpoint, requeues=9)
    assert scheduler.counters.suspensions and scheduler.counters.recomputed_tokens
    assert len(completions) == len(requests)
    for completion in completions:
        assert completion.tokens.tolist() == reference.outputs[False][by_id(completion)]
    report = drafts.report()
    counts = report["by_source"]["model"]
    assert counts["right"] >= 0.97 * counts["drafted"] > 100, "but for the last tokens"
    assert report["tokens_per_trip"] > (2 if memory > 10**6 else 1.1)
    assert model.free_pages == model.pages


def test_drafts_of_a_model_that_breaks(reference: Reference, tmp_path: Path) -> None:
    """Texts behind which its logits are NaN have no drafts; others keep theirs."""
    folder = reference.checkpoint.folder
    assert folder is not None
    broken = reference.prompts[-1][STEM - 1]
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][broken] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = resolve(load_config([f"model.path={tmp_path}"]).model)
    room = Layout((0,), 2, 9, 18, 64, "decode_first", 4, main_pages=500, swap_pages=0, host_height=0)
    requests = [
        Request(f"{index}", np.array(prompt, np.int32), SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
        for index, prompt in enumerate(reference.prompts)
    ]
    vocab = checkpoint.config.vocab_size
    of_drafts = DraftMemory.within(checkpoint, 10**8, room.page_size, torch.float32)
    model = DraftModel(of_drafts, room, vocab, torch.float32, torch.device("cpu"))
    drafts = Drafts(room.concurrency, None, 3, model=model)
    scheduler = Scheduler(room, Queue(requests), share_prefixes=True, drafter=drafts)
    for completion in completed(scheduler, room, reference.checkpoint):
        assert completion.tokens.tolist() == reference.outputs[False][by_id(completion)]
    counts = drafts.report()["by_source"]["model"]
    assert counts["right"] >= 0.95 * counts["drafted"] > 100, "but for those behind which comes the broken token"


def wanted(prompts: list[list[int]]) -> list[Request]:
    """A grammar in every request, and one thing each besides that its last rank must remember."""
    grammars = [
        checked_grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}'),
        checked_grammar("regex", "([a-z]{2},)+"),
        checked_grammar("regex", "([a-z] is one, )+"),
    ]
    extras: list[dict[str, Any]] = [
        {"rules": Rules(repetition_penalty=1.7, frequency_penalty=0.5)},
        {"logprobs": 2, "temperature": 1.4, "seed": 5},
        {"prompt_logprobs": 1, "rules": Rules(banned=((97, 98),), min_tokens=3, ends=(256,))},
        {"temperature": 1.5, "top_p": 0.95, "seed": 6},
    ]
    return [
        Request(
            f"{index}",
            np.array(prompt, np.int32),
            SamplingParams(max_tokens=OUTPUT // 2, grammar=grammars[index % 3], **extras[index % 4]),
        )
        for index, prompt in enumerate(prompts)
    ]


def test_grammars_and_penalties_survive_short_memory(tmp_path: Path) -> None:
    """As do log-probabilities and draws: suspended, swapped and computed anew, answers are what they are with room."""
    folder = save_tokenizer(make_checkpoint(tmp_path, "llama", num_hidden_layers=2))
    checkpoint = resolve(load_config([f"model.path={folder}"]).model)
    chance = np.random.default_rng(0)
    requests = wanted([chance.integers(0, 256, length).tolist() for length in LENGTHS[6::2]])
    room = Layout((0,), 1, 20, 20, 512, "prefill_first", 16, main_pages=200, swap_pages=0, host_height=1)
    least = Counters()
    answers: list[dict[str, Completion]] = []
    plans = [room]
    for main, swap, height in ((36, 0, 11), (22, 14, 11)):
        few = replace(room, rounds=3, page_size=2, main_pages=main, swap_pages=swap, micro_batch_size=4)
        plans.append(replace(few, host_height=height, max_batch_tokens=16, concurrency=18, policy="decode_first"))
    for nth, plan in enumerate(plans):
        drafts = Drafts(plan.concurrency, fixed=3, forced=Forced(lambda: guide(checkpoint))) if nth == 2 else None
        scheduler = Scheduler(
            plan,
            Queue(requests),
            eos_ids=(256,),
            share_prefixes=True,
            drafter=drafts,
        )
        answers.append(
            {each.request.custom_id: each for each in completed(scheduler, plan, checkpoint, 7 * (nth == 2))}
        )
        if nth:
            least.suspensions += scheduler.counters.suspensions
            least.recomputed_tokens += scheduler.counters.recomputed_tokens
    assert least.suspensions > 1 and least.recomputed_tokens > 50
    assert drafts is not None
    forced = drafts.report()["by_source"]["grammar"]
    assert forced["right"] > 10 and forced["right"] > 0.9 * forced["drafted"]
    roomy, *pressed = answers
    assert len(roomy) == len(requests) and len({each.finish_reason for each in roomy.values()}) == 2
    for short in pressed:
        for name, right in roomy.items():
            found = short[name]
            assert (found.tokens.tolist(), found.finish_reason) == (right.tokens.tolist(), right.finish_reason), name
            for its, of in ((found.beside, right.beside), (found.prompt_beside, right.prompt_beside)):
                assert (its is None) == (of is None)
                if its is not None and of is not None:
                    assert its.shape == of.shape
                    mine, theirs = (np.ascontiguousarray(each[:, 0]).view(np.float32) for each in (its, of))
                    np.testing.assert_allclose(mine, theirs, atol=1e-4)


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
    if pages.sliding is not None:
        held = {page for slot in scheduler.sequences.slots for page in pages.sliding.owned(slot).tolist()}
        assert len(held) + pages.sliding.free == pages.sliding.pages
