"""From the `model` section to a checkpoint: folders, hub ids, shapes alone; and the tokenizers they bring."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CHAT_TEMPLATE, make_checkpoint, save_tokenizer
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from deserve.config import ModelSection, config_dir
from deserve.errors import RequestError, UserError
from deserve.layout import Shard
from deserve.model import checkpoint as checkpoints_module
from deserve.model.checkpoint import Checkpoint, check_files, fetch_shard_files, model_dtype, resolve
from deserve.model.config import DTYPES
from deserve.model.safetensors_folder import INDEX
from deserve.model.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from deserve.model.weights import tensor_shapes


def group(name: str, **overrides) -> ModelSection:
    """A member of the group `model`, as the composed configuration holds it."""
    merged = OmegaConf.merge(OmegaConf.load(config_dir() / "model" / f"{name}.yaml"), overrides)
    return ModelSection(**OmegaConf.to_container(merged))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tokenizer(make_checkpoint(tmp_path_factory.mktemp("model"), shard_size="100KB"))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def test_tiny_is_a_shape_alone():
    tiny = resolve(group("tiny"))
    assert (tiny.name, tiny.folder, tiny.weights, tiny.eos_ids) == ("tiny", None, "dummy", (256,))
    assert (tiny.config.num_layers, tiny.config.vocab_size) == (4, 320)
    assert model_dtype(group("tiny"), tiny.config) == torch.float32
    assert isinstance(load_tokenizer(tiny), ByteTokenizer)
    assert tiny.fingerprint() == resolve(group("tiny")).fingerprint()


def test_a_named_model_with_dummy_weights_needs_no_download():
    section = group("llama-3-70b", weights="dummy")
    checkpoint = resolve(section)
    assert checkpoint.folder is None and checkpoint.hub_id is None
    assert (checkpoint.config.num_layers, checkpoint.config.group) == (80, 8)
    assert checkpoint.eos_ids == (128001, 128009)
    assert model_dtype(section, checkpoint.config) == torch.bfloat16
    assert model_dtype(group("llama-3-70b", dtype="float16"), checkpoint.config) == torch.float16
    assert load_tokenizer(checkpoint) is None
    assert checkpoint.fingerprint() != resolve(group("llama-3-8b", weights="dummy")).fingerprint()
    fetch_shard_files(checkpoint, Shard(0, 80, True, True))


@pytest.mark.parametrize(
    ("amx", "avx", "taken"), [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]
)
def test_auto_takes_the_dtype_that_the_cpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool, taken: str
) -> None:
    monkeypatch.setattr(checkpoints_module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    section = group("llama-3-70b", weights="dummy")
    stored = resolve(section).config
    assert model_dtype(section, stored, on_cpu=True) == DTYPES[taken]
    assert (
        model_dtype(section, stored)
        == model_dtype(group("llama-3-70b", dtype="bfloat16"), stored, True)
        == torch.bfloat16
    )
    assert model_dtype(group("tiny"), resolve(group("tiny")).config, on_cpu=True) == torch.float32


@pytest.mark.parametrize("weights", ["auto", "dummy"])
def test_a_folder_wins_over_the_name(saved, weights):
    checkpoint = resolve(group("llama-3-70b", path=str(saved), weights=weights))
    assert checkpoint.folder == saved and checkpoint.weights == weights
    assert checkpoint.config.hidden_size == 64
    assert isinstance(load_tokenizer(checkpoint), Tokenizer)


def test_end_of_text_is_what_any_file_states(tmp_path):
    folder = save_tokenizer(make_checkpoint(tmp_path, eos_token_id=7))
    section = ModelSection(name="own", path=str(folder))
    (folder / "generation_config.json").unlink()
    assert resolve(section).eos_ids == (7,)
    edit(folder / "generation_config.json", eos_token_id=[5, 6], temperature=0.6, top_p=0.9, do_sample=True)
    assert resolve(section).eos_ids == (5, 6, 7)
    assert resolve(section).generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=None)
    assert resolve(section).eos_ids == ()
    assert resolve(section).generation == {}
    edit(folder / "config.json", eos_token_id="end")
    with pytest.raises(UserError, match=r"config\.json: eos_token_id"):
        resolve(section)


def test_the_fingerprint_follows_what_decides_the_tokens(tmp_path):
    folder = make_checkpoint(tmp_path)
    section = ModelSection(name="own", path=str(folder))
    seen = [resolve(section).fingerprint()]
    (folder / "results.json").write_text("{}")
    assert resolve(section).fingerprint() == seen[0]
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    seen.append(resolve(section).fingerprint())
    save_tokenizer(folder)
    seen.append(resolve(section).fingerprint())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")
    seen.append(resolve(section).fingerprint())
    seen.append(resolve(ModelSection(name="own", path=str(folder), weights="dummy")).fingerprint())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_stray_files_do_not_change_the_fingerprint(tmp_path, shard_size):
    """A job may go on after another tool has put its own files beside the model's."""
    folder = make_checkpoint(tmp_path, shard_size=shard_size)
    section = ModelSection(name="own", path=str(folder))
    before = resolve(section).fingerprint()
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "original/params.json", "original/consolidated.safetensors"):
        (folder / name).write_bytes(b"stray")
    assert resolve(section).fingerprint() == before
    check_files(resolve(section))


def test_the_index_of_a_hub_s_model_is_checked_before_its_weights_come(tmp_path, saved):
    hub = replace(resolve(ModelSection(name="own", path=str(saved))), folder=tmp_path, hub_id="org/small")
    check_files(hub)  # a single file, for all that is known
    (tmp_path / INDEX).write_bytes((saved / INDEX).read_bytes())
    check_files(hub)
    shorter = replace(hub, config=replace(hub.config, num_layers=3))
    with pytest.raises(UserError, match=rf"{INDEX}: holds model\.layers\.3\."):
        check_files(shorter)
    longer = replace(hub, config=replace(hub.config, num_layers=5))
    with pytest.raises(UserError, match=rf"{INDEX}: no tensor model\.layers\.4\."):
        check_files(longer)
    name = "model-00001-of-" + next(iter(saved.glob("model-00001-of-*"))).name.split("-of-")[1]
    (tmp_path / name).write_bytes((saved / name).read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}.*truncated"):  # but those that lie here are looked at
        check_files(hub)
    check_files(replace(hub, weights="dummy"))


def test_a_tokenizer_that_git_has_not_fetched(tmp_path):
    folder = save_tokenizer(make_checkpoint(tmp_path))
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"tokenizer\.json: only a pointer to the tokenizer; `git lfs pull`"):
        check_files(resolve(ModelSection(name="own", path=str(folder))))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (ModelSection(name="own"), ["model=own", "model.path"]),
        (ModelSection(name="own", path="/no/such/folder"), ["model.path=/no/such/folder", "no such folder"]),
        (ModelSection(name="own", weights="dummy", architecture={}), ["model=own", "architectures"]),
    ],
)
def test_a_model_that_is_nowhere(section, words):
    with pytest.raises(UserError) as caught:
        resolve(section)
    assert all(word in str(caught.value) for word in words)


def test_an_unusable_folder_is_named(tmp_path):
    section = ModelSection(name="own", path=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        resolve(section)
    for text in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
            resolve(section)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: must hold a JSON object"):
        resolve(section)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = """
import sys
from deserve.config import ModelSection
from deserve.errors import UserError
from deserve.model.checkpoint import fetch_shard_files, resolve
from deserve.model.weights import Shard
try:
    checkpoint = resolve(ModelSection(name="own", path=sys.argv[1]))
    print(checkpoint.folder.name, checkpoint.config.num_layers)
    for first, last in ((0, 2), (2, 4)):
        fetch_shard_files(checkpoint, Shard(first, last, first == 0, last == 4))
        print("fetched", first)
except UserError as error:
    print("UserError", error)
"""


def test_a_hub_id_offline_is_what_the_cache_holds(tmp_path, saved):
    """A cached repository serves without a network; what is not there is one clear error."""
    repository = tmp_path / "hub" / "models--org--small"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for path in saved.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    weight_map = json.loads((saved / INDEX).read_text())["weight_map"]
    config = resolve(ModelSection(name="own", path=str(saved))).config
    first = {weight_map[name] for name in tensor_shapes(config, Shard(0, 2, True, False))}
    absent = sorted(set(weight_map.values()) - first)
    assert absent
    for name in absent:
        (snapshot / name).unlink()

    def run(hub_id: str) -> str:
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, hub_id], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    lines = run("org/small").splitlines()
    assert lines[:2] == [f"{COMMIT} 4", "fetched 0"]
    assert len(lines) == 3 and lines[2].startswith("UserError") and "org/small" in lines[2]
    assert any(name in lines[2] for name in absent)
    (line,) = run("org/other").splitlines()
    assert line.startswith("UserError model.path=org/other") and "model.weights=dummy" in line


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", ["gated", "https://huggingface.co/org/small", "HF_TOKEN"]),
        ("RepositoryNotFoundError", ["no such repository", "HF_TOKEN"]),
        ("RemoteEntryNotFoundError", ["no such file", "safetensors"]),
        ("LocalEntryNotFoundError", ["the hub's own words"]),
    ],
)
def test_what_the_hub_refuses_is_explained(saved, monkeypatch, kind, words):
    import huggingface_hub

    class Refusal(getattr(huggingface_hub.errors, kind)):
        def __init__(self):
            Exception.__init__(self, "the hub's own words\nand many more")

    def refuse(*args, **options):
        raise Refusal

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"model\.path=org/small is no local folder") as caught:
        resolve(ModelSection("own", "org/small"))
    config = resolve(ModelSection("own", str(saved))).config
    with pytest.raises(UserError, match=r"model\.path=org/small: model-0") as other:
        fetch_shard_files(Checkpoint("own", saved, config, (), hub_id="org/small"), Shard(0, 1, False, False))
    for message in (str(caught.value), str(other.value)):
        assert all(word in message for word in words) and "\n" not in message


def test_a_rank_fetches_the_files_of_its_layers(tmp_path, saved, monkeypatch):
    import huggingface_hub

    fetched = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kw: fetched.append((*args, kw)))
    local = resolve(ModelSection(name="own", path=str(saved)))
    shard = Shard(3, 4, False, True)
    fetch_shard_files(local, shard)
    assert not fetched
    hub = Checkpoint("own", saved, local.config, (), hub_id="org/small")
    fetch_shard_files(hub, shard)
    weight_map = json.loads((saved / INDEX).read_text())["weight_map"]
    needed = {weight_map[name] for name in tensor_shapes(local.config, shard)}
    assert [call[1] for call in fetched] == sorted(needed)
    assert needed < set(weight_map.values())
    assert {call[0] for call in fetched} == {"org/small"} and fetched[0][2] == {"revision": saved.name}


def test_a_checkpoint_brings_its_tokenizer(saved):
    tokenizer = Tokenizer(saved)
    assert tokenizer.vocab_size == 261 and tokenizer.eos_id == 256
    ids = tokenizer.encode("Hé  there\n")
    assert ids[0] == 257 and len(ids) == 1 + len("Hé  there\n".encode())
    assert tokenizer.decode([*ids, 256]) == "Hé  there\n"
    chat = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "a"}]), add_special_tokens=False)
    assert [token for token in chat if token >= 256] == [259, 256, 260]
    with pytest.raises(RequestError, match="unknown role robot") as caught:
        tokenizer.render_chat([{"role": "robot", "content": "a"}])
    assert caught.value.code == "invalid_messages"


def test_a_prompt_that_brings_its_bos_gets_no_second_one(saved, tmp_path, capsys):
    tokenizer = Tokenizer(saved)
    assert tokenizer.encode("a") == tokenizer.encode("<|begin|>a") == tokenizer.encode("<|begin|>a")
    assert tokenizer.encode("<|begin|><|begin|>a")[:3] == [257, 257, tokenizer.encode("a")[1]]  # as it was written
    assert tokenizer.encode("a<|begin|>").count(257) == 2
    assert capsys.readouterr().err == "deserve: prompts that begin with <|begin|> get no second one\n"
    chat = Tokenizer(save_tokenizer(tmp_path, "{{ bos_token }}" + CHAT_TEMPLATE))
    assert chat.encode(chat.render_chat([{"role": "user", "content": "a"}]), add_special_tokens=False)[:3] == [
        257,
        259,
        tokenizer.encode("a")[1],
    ]


def test_no_token_is_longer_than_the_longest(saved):
    assert Tokenizer(saved).longest_token == len("<|assistant|>")


def test_a_missing_template_and_a_broken_tokenizer(tmp_path):
    folder = save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(RequestError) as caught:
        Tokenizer(folder).render_chat([{"role": "user", "content": "a"}])
    assert caught.value.code == "no_chat_template"
    wants_system = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    for template, code in {
        "{{ nothing.of_this() }}": "no_chat_template",
        "{{ messages[0].content.upper() }}": "invalid_messages",
        wants_system: "invalid_messages",
    }.items():
        with pytest.raises(RequestError, match="the chat template refuses") as caught:
            Tokenizer(save_tokenizer(tmp_path, template)).render_chat([{"role": "user", "content": 3}])
        assert caught.value.code == code
    (folder / "tokenizer.json").write_text("broken")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        Tokenizer(folder)


def test_bytes_are_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("Grüße"), 256, 300]) == "Grüße"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "user: hi\nassistant: "
    with pytest.raises(RequestError):
        tokenizer.render_chat([{"role": "user"}])


def test_the_program_imports_no_more_than_every_rank_needs():
    """transformers takes seconds, and only rank 0 tokenizes."""
    program = (
        "import sys, deserve.run\n"
        "assert not {'transformers', 'gguf', 'huggingface_hub', 'jinja2', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
