"""A model that the user already has: what its folder says holds, through the whole program; or it is a hub id."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint, reference_model, save_tokenizer
from launch import python, run_here, run_jobs, run_ranks
from results import code, read_results
from test_pipeline import greedy, sampled, until_eos

from deserve.config import ModelSection, SamplingSection, load_config
from deserve.errors import UserError
from deserve.layout import Shard
from deserve.model.checkpoint import model_dtype, resolve
from deserve.model.config import DTYPES
from deserve.model.safetensors_folder import INDEX
from deserve.model.tokenizer import Tokenizer
from deserve.model.weights import tensor_shapes
from deserve.workload.sampling import default_sampling, with_derived_seed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MAX_TOKENS = 12
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c" * 40},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A chat model in several files, in bfloat16, with sampling defaults; each of three files names its own end."""
    folder = tmp_path_factory.mktemp("chat-model")
    options = {"shard_size": "40KB", "std": 0.1, "dtype": DTYPES["bfloat16"]}
    save_tokenizer(make_checkpoint(folder, "qwen3", **options))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "I"}))  # id 40
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 30, "eos_token_id": [11]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


# What the command line means


@pytest.mark.parametrize("entry", [[], ["model=tiny"], ["model=llama-3.1-8b"]])
def test_a_path_brings_its_own_weights_dtype_and_name(entry: list[str], folder: Path) -> None:
    """Whatever entry of the group stands beside it."""
    section = load_config([*entry, f"model.path={folder}"]).model
    assert section == ModelSection(name=folder.name, path=str(folder))
    checkpoint = resolve(section)
    assert checkpoint.weights == "auto" and checkpoint.config.qk_norm and checkpoint.eos_ids == (11, 256)
    assert model_dtype(section, checkpoint.config) == DTYPES["bfloat16"]


def test_what_is_said_of_a_path_holds(folder: Path) -> None:
    said = ["model.weights=dummy", "++model.dtype=float16", "model.name=mine"]
    section = load_config(["model=tiny", f"model.path={folder}", *said]).model
    assert section == ModelSection("mine", str(folder), "dummy", "float16")
    assert resolve(section).config.qk_norm  # random weights, in the folder's shape


def test_a_hub_id_is_its_own_name(tmp_path: Path) -> None:
    assert load_config(["model=tiny", "model.path=org/small"]).model == ModelSection("org/small", "org/small")


def test_an_entry_of_the_group_keeps_what_it_says() -> None:
    assert load_config(["model=tiny"]).model.weights == "dummy"
    section = load_config(["model=llama-3.1-8b", "model.weights=dummy"]).model
    assert section.name == "llama-3.1-8b" and section.architecture is not None
    assert resolve(section).config.hidden_size == 4096


# Chats


def answers(output: Path) -> dict[str, dict[str, Any]]:
    lines = read_results(output)
    assert not any(map(code, lines))
    return {line["custom_id"]: line["response"]["body"] for line in lines}


def test_chats_with_the_folder_s_template_and_defaults(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    requests = [{"custom_id": f"own-{index}", "messages": chat} for index, chat in enumerate(CHATS)]
    cold = {"temperature": 0, "return_token_ids": True}
    requests += [{"custom_id": f"cold-{index}", "messages": chat, **cold} for index, chat in enumerate(CHATS)]
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    job = [f"model.path={folder}", "model.dtype=float32", f"workload.source={source}"]
    job += [f"sampling.max_tokens={MAX_TOKENS}"]
    jobs = {"model": [], "greedy": ["sampling.temperature=0"], "user": ["sampling.top_k=5"]}
    run_jobs(2, [[*job, f"output.dir={tmp_path / name}", *more] for name, more in jobs.items()], tmp_path)

    model, tokenizer = reference_model(folder, DTYPES["float32"]), Tokenizer(folder)
    generation = resolve(ModelSection("own", str(folder))).generation
    sections = {
        "model": SamplingSection(),
        "greedy": SamplingSection(temperature=0.0),
        "user": SamplingSection(top_k=5),
    }
    ends: set[int] = set()
    for name, section in sections.items():
        given = answers(tmp_path / name)
        assert given.keys() == {request["custom_id"] for request in requests}
        reasons = set()
        for request in requests:
            prompt = tokenizer.encode(tokenizer.render_chat(request["messages"]), add_special_tokens=False)
            defaults = with_derived_seed(default_sampling(section, generation), request["custom_id"])
            wanted = replace(defaults, temperature=request.get("temperature", defaults.temperature))
            if wanted.temperature:
                choice = (wanted.temperature, wanted.top_p, wanted.top_k, wanted.seed)
                tokens = sampled(model, prompt, MAX_TOKENS, *choice)
            else:
                tokens = greedy(model, prompt, MAX_TOKENS)
            ids, reason = until_eos(tokens, [256, 11, 40])
            right = [int(token) for token in ids.split()]
            body = given[request["custom_id"]]
            assert body["model"] == folder.name
            assert body["usage"]["prompt_tokens"] == len(prompt)
            assert body["usage"]["completion_tokens"] == len(right)
            (choice,) = body["choices"]
            assert choice["finish_reason"] == reason
            if "return_token_ids" in request:
                assert (body["prompt_token_ids"], choice["token_ids"]) == (prompt, right)
            content = tokenizer.decode(right[:-1] if reason == "stop" else right)
            assert choice["message"] == {"role": "assistant", "content": content}
            ends |= {right[-1]} if reason == "stop" else set()
            reasons.add(reason)
    assert {11, 40} <= ends <= {11, 40, 256}
    model_s, users = answers(tmp_path / "model"), answers(tmp_path / "user")
    assert any(model_s[key]["choices"] != users[key]["choices"] for key in model_s)


# Hub ids


def lay_out(home: Path, folder: Path, files: set[str]) -> None:
    """The hub library's cache of `org/small`, as if `files` of `folder` had been fetched."""
    repository = home / "hub" / "models--org--small"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in files:
        (snapshot / name).write_bytes((folder / name).read_bytes())


def test_ranks_need_the_files_of_their_own_layers(folder: Path, tmp_path: Path) -> None:
    """Each rank's cache holds those alone: a job through the hub id answers as one through the folder does."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    config = resolve(ModelSection("own", str(folder))).config
    small = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
    held = []
    for rank, shard in enumerate((Shard(0, 2, True, False), Shard(2, 4, False, True))):
        held.append({weight_map[name] for name in tensor_shapes(config, shard)})
        lay_out(tmp_path / f"rank{rank}", folder, small | held[rank])
    assert held[0] - held[1] and held[1] - held[0]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    job = [f"workload.source={source}", "sampling.temperature=0", f"sampling.max_tokens={MAX_TOKENS}"]
    job += ["model.dtype=float32"]

    hub = [*job, "pipeline.partition=[emb,2]", "model.path=org/small", f"output.dir={tmp_path / 'hub'}"]
    done = run_ranks(2, "hub_worker.py", tmp_path, *hub)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run_here(*job, f"model.path={folder}", f"output.dir={tmp_path / 'local'}") == 0
    given, local = answers(tmp_path / "hub"), answers(tmp_path / "local")
    assert given.keys() == local.keys() and len(given) == len(CHATS)
    for key, body in given.items():
        assert body["model"] == "org/small" and local[key]["model"] == folder.name
        assert body["choices"] == local[key]["choices"]

    # Cut elsewhere, the last rank lacks a file, and the message says whose and which
    done = run_ranks(2, "hub_worker.py", tmp_path, *hub, "pipeline.partition=[emb,1]")
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("deserve: error:")]
    assert "rank 1: model.path=org/small: model-0" in message and "HF_HUB_OFFLINE" in message


def test_a_hub_id_that_is_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = python("-m", "deserve.run", "model.path=org/other", f"output.dir={tmp_path / 'out'}")
    assert done.returncode == 1
    (message,) = done.stderr.splitlines()
    assert message.startswith("deserve: error: model.path=org/other is no local folder")
    assert "HF_HUB_OFFLINE" in message and "give a folder" in message


def test_a_file_is_no_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is a file"):
        run_here(f"model.path={folder}/config.json", f"output.dir={tmp_path / 'out'}")
