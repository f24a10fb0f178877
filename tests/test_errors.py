"""Mistakes of a user: one clear message, all ranks down within seconds; and of a request: an error line, no more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_checkpoint, save_tokenizer
from launch import run_here, run_jobs, torchrun
from results import code, read_results
from safetensors.torch import load_file, save_file

from deserve.config import load_config
from deserve.errors import UserError
from deserve.layout import Layout, parse_partition
from deserve.memory import held_by_others
from deserve.model.checkpoint import resolve
from deserve.run import main, set_up_device
from deserve.stage import load_stage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", max_position_embeddings=128)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pipeline.round=3", "pipeline.round"),
        ("pipeline.rounds=many", "pipeline.rounds"),
        ("sampling.stop=5", "sampling.stop"),
        ("kvcache.page_size=0", "kvcache.page_size"),
        ("model=gpt-5", "gpt-5"),
        ("modle=tiny", "modle is not a key (did you mean model?)"),
        ("rounds=4", "did you mean pipeline.rounds?"),
        ("prompts.jsonl", "prompts.jsonl is not key=value, such as workload.source=prompts.jsonl"),
        ("sampling.stop=a,b", "write a list as sampling.stop=[a,b]"),
        ("model=llama3", "model=llama3 is not one of gemma-3-27b, "),
        ("sampling.temperature=hot", "sampling.temperature=hot must be a number"),
        ("workload.limit=ten", "workload.limit=ten must be a whole number"),
        ("workload.source=tests", "is a folder"),
        ("workload.source=none.jsonl", "workload.source=none.jsonl cannot be read: No such file"),
        ("workload.source=squad", "squad"),
        ("workload.source=README.md", "plain text"),
    ],
)
def test_overrides_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    """Seen before the ranks meet, so one process shows it as well as many."""
    monkeypatch.setattr("sys.argv", ["deserve.run", "model=tiny", override])
    assert main() == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("deserve: error:") and named in message


def test_models_that_cannot_make_drafts(tmp_path: Path, folder: Path) -> None:
    small = "workload.source=fixed2:8:0", "sampling.max_tokens=4"

    def message(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            output = f"output.dir={tmp_path}/{len(list(tmp_path.iterdir()))}"
            run_here(f"model.path={folder}", *small, output, *overrides)
        return str(caught.value)

    assert "speculation.tokens=0" in message(f"speculation.model={folder}", "speculation.tokens=0")
    assert "speculation.model=/nowhere: give a folder" in message("speculation.model=/nowhere")
    other = make_checkpoint(tmp_path / "other", vocab_size=300)
    assert "other has 300 tokens, and model has 320" in message(f"speculation.model={other}")
    for name in (folder, other):
        save_tokenizer(name)
    changed = (other / "tokenizer.json").read_text().replace("<|user|>", "<|human|>")
    (other / "tokenizer.json").write_text(changed)
    assert "other tokens than that of model" in message(f"speculation.model={other}")


def test_an_unknown_override_under_torchrun(tmp_path: Path) -> None:
    """Ranks say it once."""
    done = torchrun(2, "-m", "deserve.run", "model=tiny", f"output.dir={tmp_path}", "pipeline.round=3")
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("deserve: error:")]
    assert "pipeline.round" in message
    # torchrun's summary, the last thing on the screen, says it again.
    assert f"traceback : {message}\n" in done.stderr.split("Root Cause")[-1], done.stderr[-3000:]
    # torchrun's own traceback is its own affair; ours would name a file of the package.
    assert "deserve/" not in done.stderr.replace(message, "")


def test_a_folder_without_weights(tmp_path: Path, folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError) as caught:
        run_here(f"model.path={folder}", "workload.source=fixed2:8:0", f"output.dir={tmp_path}")
    assert "safetensors" in str(caught.value) and str(folder) in str(caught.value)


def test_damaged_weights_end_the_job_before_the_survey(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    """Every rank looks at all of them, before there is a plan that divides them."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name] = torch.zeros(7, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("deserve.run.survey", None)
    with pytest.raises(UserError) as caught:
        run_here(f"model.path={folder}", "workload.source=fixed2:8:0", f"output.dir={tmp_path}")
    assert name in str(caught.value) and "[7, 64]" in str(caught.value)


def test_a_partition_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pipeline\.partition"):
        run_here("model=tiny", "pipeline.partition=[emb,4]", "workload.source=fixed2:8:0", f"output.dir={tmp_path}")


@pytest.mark.parametrize(
    "partition", [["emb"], ["emb", 4], ["emb", 2, 3], [1, 2], ["emb", 0], ["emb", -1], ["emb", "2"], 2, "half"]
)
def test_partitions_that_cannot_work(partition: object) -> None:
    with pytest.raises(UserError, match=r"pipeline\.partition"):
        parse_partition(partition, ranks=2, layers=4)


def answers(output: Path) -> dict[str, str]:
    """Each request's error code, or how its answer ended: the last line counts, and only errors are followed by one."""
    found: dict[str, str] = {}
    errors = read_results(output, "errors.jsonl") if (output / "errors.jsonl").exists() else []
    for entry in [*read_results(output), *errors]:
        name = entry["custom_id"]
        assert found.get(name) not in ("stop", "length")
        found[name] = code(entry) or entry["response"]["body"]["choices"][0]["finish_reason"]
    return found


def test_bad_lines_become_error_lines_and_the_rest_runs(tmp_path: Path) -> None:
    """And an empty file is a job without requests."""
    source, output = tmp_path / "empty.jsonl", tmp_path / "empty"
    source.touch()
    empty = ["model=tiny", f"workload.source={source}", f"output.dir={output}"]
    good = {"prompt": [1, 2, 3], "ignore_eos": True}
    lines = [
        json.dumps(good | {"custom_id": "first", "note": "to be ignored"}),
        '{"prompt": [1, 2',
        json.dumps({"custom_id": "other", "method": "POST", "url": "/v1/embeddings", "body": good}),
        json.dumps({"custom_id": "empty", "prompt": ""}),
        json.dumps({"custom_id": "long", "prompt": [1] * 2048}),
        json.dumps(good | {"custom_id": "negative", "max_tokens": -1}),
        json.dumps(good | {"custom_id": "first"}),
        json.dumps({"custom_id": "foreign", "prompt": [320]}),
        json.dumps(good | {"custom_id": "last", "max_tokens": 2, "stop": ["never"]}),
        json.dumps(good | {"custom_id": "token", "max_tokens": 2, "stop_token_ids": list(range(320))}),
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    job = ["model=tiny", f"workload.source={source}", "sampling.max_tokens=8", f"output.dir={tmp_path / 'out'}"]
    printed = run_jobs(2, [empty, [*job, "workload.unknown_keys=ignore", "output.errors=separate"]], tmp_path)
    assert not any(map(code, read_results(tmp_path / "out")))
    assert (output / "results.jsonl").read_text() == ""
    assert json.loads((output / "metrics.json").read_text())["requests"] == 0
    found = answers(tmp_path / "out")
    assert (found.pop("first"), found.pop("last"), found.pop("token")) == ("length", "length", "stop")
    assert found == {
        "line-2": "invalid_json",
        "other": "unsupported_url",
        "empty": "empty_prompt",
        "long": "context_length_exceeded",
        "negative": "invalid_value",
        "line-7": "duplicate_custom_id",
        "foreign": "invalid_value",
    }
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["requests"], metrics["errors"], metrics["output_tokens"]) == (10, 7, 11)
    assert metrics["max_output_tokens"] == 12 and metrics["plan"]["predicted_for_these_answers"] > 0
    assert "if all answers are as long as max_tokens allows" in printed
    assert (metrics["ignored_keys"], metrics["cut_by_default_max_tokens"]) == ({"note": 1}, 1)
    assert "unknown_keys=ignore: note (once)" in printed and "1 answer was cut at sampling.max_" in printed


def test_what_kv_memory_can_never_hold_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    """Four pages of 16 tokens; the last token of an answer needs no place."""
    source = tmp_path / "in.jsonl"
    sizes = {"fits": (40, 25), "answer": (40, 26), "prompt": (65, 1), "also fits": (1, 1)}
    with source.open("w") as file:
        for name, (prompt, count) in sizes.items():
            entry = {"custom_id": name, "prompt": [5] * prompt, "max_tokens": count, "ignore_eos": True}
            file.write(json.dumps(entry) + "\n")
    job = ["model=tiny", f"workload.source={source}", "kvcache.main_pages=4", "kvcache.swap_pages=0"]
    assert run_here(*job, f"output.dir={tmp_path / 'out'}") == 0
    refused = "kv_memory_exceeded"
    assert answers(tmp_path / "out") == {"fits": "length", "answer": refused, "prompt": refused, "also fits": "length"}
    results = (tmp_path / "out" / "results.jsonl").read_text()
    assert "need room for 65 tokens" in results and "4 pages of 16 tokens hold 64" in results


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), MemoryError()]
)
def test_out_of_memory_says_what_needs_how_much(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("deserve.stage.dummy_shard", too_much)
    checkpoint = resolve(load_config(["model=tiny"]).model)
    layout = Layout((0,), 3, 4, 12, 64, "prefill_first", 16, 100, 20, 5)
    with pytest.raises(UserError, match=r"4 layers.*110 KV pages.*76 pages in host memory.*kvcache\.gpu_memory_gb"):
        load_stage(checkpoint, layout, layout.shard(0, 4), torch.float32, torch.device("cpu"))


class Full:
    """`torch.cuda` of a GPU of 80 GB, 50 GB of it free and 10 GB this process' own; or with no room for a context."""

    def __init__(self, context: bool = True):
        self._context = context

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(uuid="0b1c", total_memory=80_000_000_000)

    def set_device(self, device: torch.device) -> None:
        pass

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        if not self._context:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return 50_000_000_000, 80_000_000_000

    def memory_reserved(self, device: torch.device) -> int:
        return 10_000_000_000

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 8


def smi(monkeypatch: pytest.MonkeyPatch, output: str | None) -> None:
    """Let nvidia-smi answer `output`; None: there is none."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if output is None:
            raise FileNotFoundError(command[0])
        assert command[:2] == ["nvidia-smi", "--id=GPU-0b1c"]
        return subprocess.CompletedProcess(command, 0, output)

    monkeypatch.setattr("deserve.memory.subprocess.run", run)


def test_who_else_holds_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Full())
    gpu = torch.device("cuda", 3)
    mine = f"{os.getpid()}, 9000, python\n"
    smi(monkeypatch, f"4242, 40960, /usr/bin/python, the other\n{mine}4243, [N/A], Xorg\n")
    first, second = "process 4242 (/usr/bin/python, the other) holds 42.9 GB of it", "process 4243 (Xorg) holds memory"
    assert held_by_others(gpu) == f"; {first}; {second} of it"
    for output in (None, "", mine):
        smi(monkeypatch, output)
        assert held_by_others(gpu) == "; other processes hold about 19.0 of its 80.0 GB"
    monkeypatch.setattr(Full, "memory_reserved", lambda *_: 30_000_000_000)
    assert held_by_others(gpu) == ""


def test_a_gpu_that_another_process_has_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Full(context=False))
    smi(monkeypatch, "4242, 81000, python\n")
    world = SimpleNamespace(rank=5, local_rank=1, local_size=2)
    message = r"rank 5 cannot use GPU 1 .*: CUDA error: out of memory; process 4242 \(python\) holds 84\.9 GB"
    with pytest.raises(UserError, match=message):
        set_up_device(load_config(["model=tiny"]), world)


def test_a_rank_ends_at_once_when_all_is_done() -> None:
    """With all that it has printed, and without Python's own end, during which a kill keeps other hosts waiting."""
    program = "import atexit; from deserve.run import end; atexit.register(print, 'late'); print('said'); end(3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")
