"""Which tensors a rank reads, that they arrive in the right place, and what is said when they cannot."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model, save_dummy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deserve.errors import UserError
from deserve.kvcache.pages import KVPages
from deserve.layout import Shard
from deserve.model import linear, safetensors_folder
from deserve.model.backend.base import Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.config import ModelConfig, parse_config
from deserve.model.decoder import Decoder
from deserve.model.layer import Experts
from deserve.model.linear import Linear
from deserve.model.safetensors_folder import INDEX
from deserve.model.weights import (
    EMBEDDING,
    HEAD,
    ShardWeights,
    check_weights,
    dummy_shard,
    layer_parts,
    load_shard,
    parameter_bytes,
    tensor_shapes,
)

CPU = torch.device("cpu")
FLOAT = torch.float32
WHOLE = Shard(0, 4, True, True)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def config_of(folder: Path) -> ModelConfig:
    return parse_config(json.loads((folder / "config.json").read_text()), str(folder))


def tensors_of(loaded: ShardWeights) -> dict[str, torch.Tensor]:
    """Every tensor of a shard, by a name that says where it lies."""
    found = {"embedding": loaded.embedding, "final_norm": loaded.final_norm, "head": loaded.head}
    for index, layer in enumerate(loaded.layers):
        parts = vars(layer) | vars(layer.attention) | vars(layer.mlp)
        found |= {f"{index}.{field}": part for field, part in parts.items() if isinstance(part, torch.Tensor | Linear)}
    linears = {name: part for name, part in found.items() if isinstance(part, Linear)}
    found |= {f"{name}.weight": part.weight for name, part in linears.items()}
    found |= {f"{name}.bias": part.bias for name, part in linears.items()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


@pytest.fixture
def reads(monkeypatch):
    """The (file name, tensor) pairs read while a test runs."""
    log: list[tuple[str, str]] = []
    plain = safetensors_folder.safe_open

    class Spy:
        def __init__(self, path, **options):
            self.path, self.inner = Path(path), plain(path, **options)

        def __enter__(self):
            self.handle = self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def keys(self):
            return self.handle.keys()

        def get_slice(self, name):
            return self.handle.get_slice(name)

        def get_tensor(self, name):
            log.append((self.path.name, name))
            return self.handle.get_tensor(name)

    monkeypatch.setattr(safetensors_folder, "safe_open", Spy)
    return log


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_fused_weights_hold_what_transformers_loads(tmp_path, family, options, shard_size):
    folder = make_checkpoint(tmp_path, family, shard_size=shard_size, **options)
    assert (folder / INDEX).is_file() == (shard_size == "100KB")
    config = config_of(folder)
    loaded = load_shard(folder, config, WHOLE, CPU, FLOAT)
    model = reference_model(folder)
    state = model.state_dict()
    found = tensors_of(loaded)
    for index in range(len(loaded.layers)):
        for field, spec in layer_parts(config, index).items():
            for name, parts in spec.parts.items():
                expected = torch.cat([state[tensor] for tensor, _ in parts])
                place = f"{index}.{field}" if name == "tensor" else f"{index}.{field}.{name}"
                assert torch.equal(found.pop(place), expected), place
    assert found.keys() == {"embedding", "final_norm", "head.weight"}
    assert torch.equal(loaded.embedding, state[EMBEDDING])
    assert torch.equal(loaded.head.weight, state[HEAD])
    with pytest.MonkeyPatch.context() as patch:  # as on a GPU
        patch.setattr(linear, "_blocks", lambda dtype: False)
        plain = load_shard(folder, config, WHOLE, CPU, FLOAT)
    assert (plain.head.weight is plain.embedding) == config.tied_embeddings
    assert sum(t.numel() for t in model.parameters()) * 4 == parameter_bytes(config, WHOLE, FLOAT)


def test_a_projection_is_the_one_that_the_model_computes(tmp_path):
    """The order of rows: q, k, v and gate, up."""
    folder = make_checkpoint(tmp_path, "qwen2")
    layer = load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT).layers[1]
    theirs = reference_model(folder).model.layers[1]
    x = torch.randn(5, 64)
    q, k, v = layer.attention.qkv(x).split([64, 32, 32], dim=-1)
    for mine, module in zip((q, k, v), ("q_proj", "k_proj", "v_proj"), strict=True):
        torch.testing.assert_close(mine, getattr(theirs.self_attn, module)(x))
    gate, up = layer.mlp.gate_up(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer.mlp.down(torch.nn.functional.silu(gate) * up), theirs.mlp(x))


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_reads_its_own_tensors_alone(tmp_path, reads, tied):
    folder = make_checkpoint(tmp_path, shard_size="60KB", tie_word_embeddings=tied)
    config = config_of(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    load_shard(folder, config, Shard(2, 4, False, True), CPU, FLOAT)
    names = [name for _, name in reads]
    assert len(names) == len(set(names))
    assert (EMBEDDING in names) == tied
    assert (HEAD in names) == (not tied)
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.")) for name in names)
    # and opens no file for another's sake
    assert {file for file, _ in reads} == {weight_map[name] for name in names}
    assert {file for file, _ in reads} < set(weight_map.values())
    reads.clear()
    load_shard(folder, config, Shard(0, 2, True, False), CPU, FLOAT)
    assert {name for _, name in reads} == set(tensor_shapes(config, Shard(0, 2, True, False)))


@given(cuts=st.lists(st.integers(0, 4), max_size=5), tied=st.booleans(), qwen=st.booleans())
def test_any_partition_covers_every_tensor_once(cuts, tied, qwen):
    raw = TINY | {"tie_word_embeddings": tied, "architectures": [f"{'Qwen3' if qwen else 'Llama'}ForCausalLM"]}
    config = parse_config(raw, "raw")
    bounds = [0, *sorted(cuts), 4]
    last = len(bounds) - 2
    shards = [Shard(bounds[i], bounds[i + 1], i == 0, i == last) for i in range(last + 1)]
    names = [name for shard in shards for name in tensor_shapes(config, shard)]
    whole = tensor_shapes(config, WHOLE)
    twice = [EMBEDDING] if tied and len(shards) > 1 else []  # the last rank needs a copy of its own
    assert sorted(names) == sorted([*whole, *twice])
    matrix = 320 * 64 * 2
    total = sum(parameter_bytes(config, shard, torch.bfloat16) for shard in shards)
    assert total == parameter_bytes(config, WHOLE, torch.bfloat16) + matrix * len(twice)


@given(cut=st.integers(0, 4), seed=st.integers(0, 2**40))
def test_dummy_weights_do_not_depend_on_the_partition(cut, seed):
    config = parse_config(TINY | {"tie_word_embeddings": True, "attention_bias": True}, "raw")
    whole = dummy_shard(config, WHOLE, CPU, FLOAT, seed)
    first = dummy_shard(config, Shard(0, cut, True, False), CPU, FLOAT, seed)
    second = dummy_shard(config, Shard(cut, 4, False, True), CPU, FLOAT, seed)
    joined = ShardWeights(first.layers + second.layers, first.embedding, second.final_norm, second.head)
    expected, found = tensors_of(whole), tensors_of(joined)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_dummy_weights_are_sane_and_those_that_save_dummy_writes(tmp_path):
    folder = save_dummy(TINY | {"torch_dtype": "float32"}, tmp_path)
    config = config_of(folder)
    mine = dummy_shard(config, WHOLE, CPU, FLOAT)
    read = load_shard(folder, config, WHOLE, CPU, FLOAT)
    assert all(torch.equal(tensor, tensors_of(read)[name]) for name, tensor in tensors_of(mine).items())
    layer = mine.layers[0]
    qkv = layer.attention.qkv.weight
    assert torch.equal(layer.input_norm, torch.ones(64))
    assert qkv.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(qkv, mine.layers[1].attention.qkv.weight)
    assert not torch.equal(qkv, dummy_shard(config, WHOLE, CPU, FLOAT, seed=1).layers[0].attention.qkv.weight)
    assert reference_model(folder).model.layers[3].mlp.down_proj.weight.equal(mine.layers[3].mlp.down.weight)


def test_dtype_is_converted(tmp_path):
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    loaded = load_shard(folder, config_of(folder), Shard(1, 2, False, True), CPU, FLOAT)
    assert config_of(folder).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in tensors_of(loaded).values()} == {FLOAT}
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(loaded.layers[0].mlp.down.weight, stored.float())


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD, "both"])
def test_a_tied_matrix_may_be_saved_under_either_name(tmp_path, kept):
    folder = save_dummy(TINY | {"tie_word_embeddings": True}, tmp_path)
    stored = load_file(folder / "model.safetensors")
    matrix = stored.pop(EMBEDDING)
    stored |= {name: matrix.clone() for name in (EMBEDDING, HEAD) if kept in (name, "both")}
    save_file(stored, folder / "model.safetensors")
    config = config_of(folder)
    assert torch.equal(load_shard(folder, config, Shard(3, 4, False, True), CPU, FLOAT).head.weight, matrix)
    assert torch.equal(load_shard(folder, config, Shard(0, 1, True, False), CPU, FLOAT).embedding, matrix)


def test_the_only_file_may_have_another_name(tmp_path):
    folder = save_dummy(TINY, tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert len(load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT).layers) == 4


DOWN = "model.layers.2.mlp.down_proj.weight"


def _drop(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored[DOWN]
    save_file(stored, folder / "model.safetensors")


def _misshape(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {DOWN: torch.zeros(64, 95)}, folder / "model.safetensors")


def _quantise(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {DOWN: torch.zeros(64, 96, dtype=torch.int8)}, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _elsewhere(folder: Path, name: str, file: str) -> None:
    names = load_file(folder / "model.safetensors")
    _index(folder, dict.fromkeys(names, "model.safetensors") | {name: file})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, ["model.safetensors", DOWN]),
        (_misshape, ["model.safetensors", DOWN, "[64, 95]", "[64, 96]"]),
        (_quantise, ["model.safetensors", DOWN, "I8", "BF16"]),
        (_truncate, ["model.safetensors", "truncated"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"not it"), ["model.safetensors", "corrupt"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors", "corrupt"]),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3),
            ["model.safetensors", "pointer", "git lfs pull"],
        ),
        (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), [".bin", "safetensors"]),
        (lambda f: (f / "model.safetensors").rename(f / "a.safetensors.gz"), ["no model.safetensors"]),
        (
            lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
            [INDEX, "half a download"],
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "model.safetensors.incomplete"),
            ["no model.safetensors", "half a download", "model.safetensors.incomplete"],
        ),
        (
            lambda f: _elsewhere(f, DOWN, "gone.safetensors"),
            ["1 of the 2 files", "gone.safetensors", "half a download"],
        ),
        (lambda f: _index(f, {}), [INDEX, EMBEDDING]),
        (lambda f: (f / INDEX).write_text("{"), [INDEX, "weight_map"]),
        (lambda f: (f / INDEX).write_text("[]"), [INDEX, "weight_map"]),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    """By the check before the survey, and in the same words by whoever loads all the same."""
    folder = save_dummy(TINY, tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        check_weights(folder, config_of(folder))
    message = str(caught.value)
    assert all(word in message for word in [str(folder), *words]), message
    assert "\n" not in message
    with pytest.raises(UserError) as again:
        load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT)
    assert str(again.value) == message


def _add(folder: Path, **tensors: torch.Tensor) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(stored | tensors, folder / "model.safetensors")


@pytest.mark.parametrize("indexed", [False, True])
def test_tensors_that_nobody_asks_for_are_refused(tmp_path, indexed):
    """Else the answers would be those of a model without its last layer."""
    folder = make_checkpoint(tmp_path, shard_size="60KB" if indexed else "1GB")
    config = replace(config_of(folder), num_layers=3)
    with pytest.raises(
        UserError, match=r"model\.layers\.3\.input_layernorm\.weight and 8 more.*config\.json"
    ) as caught:
        check_weights(folder, config)
    assert (INDEX in str(caught.value)) == indexed


def test_tensors_beside_the_index_are_refused_too(tmp_path):
    folder = save_dummy(TINY, tmp_path)
    _index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"))
    _add(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(UserError, match=r"model\.safetensors: holds model\.layers\.0\.self_attn\.q_proj\.bias,"):
        check_weights(folder, config_of(folder))


def test_tensors_that_follow_from_the_config_are_harmless(tmp_path, reads):
    folder = save_dummy(TINY, tmp_path)
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached", "model.position_ids"]
    _add(folder, **{name: torch.zeros(8) for name in names})
    check_weights(folder, config_of(folder))
    assert not reads  # headers alone
    assert len(load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT).layers) == 4


def test_a_head_that_only_the_config_ties_is_refused(tmp_path):
    folder = save_dummy(TINY | {"tie_word_embeddings": True}, tmp_path)
    _add(folder, **{HEAD: torch.zeros(320, 64)})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_weights(folder, config_of(folder))


@pytest.mark.parametrize("indexed", [False, True])
def test_stray_files_change_nothing(tmp_path, indexed):
    folder = make_checkpoint(tmp_path, shard_size="60KB" if indexed else "1GB")
    expected = tensors_of(load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT))
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "original/model.safetensors"):
        save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / name)
    (folder / "consolidated.00.pth").write_bytes(b"stray")
    check_weights(folder, config_of(folder))
    found = tensors_of(load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("place", ["download/.cache/huggingface/download", "blobs"])
def test_half_a_download_is_called_that(tmp_path, place):
    """Where the hub's library leaves what it has not finished: in a local folder, and in its cache."""
    folder = make_checkpoint(tmp_path / ("download" if place != "blobs" else "snapshots/commit"), shard_size="60KB")
    absent = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))[1:]
    for name in absent:
        (folder / name).unlink()
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "0a1b.incomplete").touch()
    words = rf"{len(absent)} of the {len(absent) + 1} files.*{absent[0]}.*half a download.*0a1b\.incomplete"
    with pytest.raises(UserError, match=words):
        check_weights(folder, config_of(folder))
    check_weights(folder, config_of(folder), fetched=False)  # a hub's snapshot, whose weights come later


def test_one_damaged_file_of_several_is_named(tmp_path):
    """And only the rank that reads it minds."""
    folder = make_checkpoint(tmp_path, shard_size="60KB")
    config = config_of(folder)
    file = json.loads((folder / INDEX).read_text())["weight_map"][DOWN]
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    load_shard(folder, config, Shard(0, 1, True, False), CPU, FLOAT)
    with pytest.raises(UserError, match=rf"{file}: cannot read its header.*truncated"):
        load_shard(folder, config, WHOLE, CPU, FLOAT)


def test_the_index_may_lie_about_a_file(tmp_path):
    folder = save_dummy(TINY, tmp_path)
    save_file({"other": torch.zeros(1)}, folder / "other.safetensors")
    _elsewhere(folder, DOWN, "other.safetensors")
    with pytest.raises(UserError, match=rf"other.safetensors: no tensor {DOWN}"):
        load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT)


def test_missing_folder_and_ambiguous_files(tmp_path):
    config = parse_config(TINY, "raw")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_shard(tmp_path / "nowhere", config, WHOLE, CPU, FLOAT)
    for name in ("a", "b"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"2 safetensors files, but no {INDEX}"):
        load_shard(tmp_path, config, WHOLE, CPU, FLOAT)


def test_random_routers_pick_evenly(monkeypatch):
    """Tokens of one prompt too, in every layer: a plan made with random weights counts on it."""
    raw = {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 8}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64}
    raw |= {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "rms_norm_eps": 1e-6}
    config = parse_config(raw | {"max_position_embeddings": 512}, "test")
    weights, backend = dummy_shard(config, Shard(0, 8, True, True), CPU, FLOAT), TorchBackend(config, FLOAT, CPU, 512)
    kv = KVPages(config.kv_spec(FLOAT), 8, page_size=16, main_pages=4, device=CPU)
    touched = []
    route = Experts.route

    def counted(self: Experts, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, picked = route(self, h)
        touched.append(len(picked.unique()))
        return weights, picked

    monkeypatch.setattr(Experts, "route", counted)
    backend.begin_visit(Rows(np.array([64], np.int32), np.zeros(1, np.int32), [np.arange(4, dtype=np.int32)[None]]))
    decoder = Decoder(config, weights, backend)
    with torch.inference_mode():
        decoder.forward(decoder.embed(torch.arange(64)), kv)
    assert len(touched) == 8
    assert config.experts.touched(64) == pytest.approx(31.5, abs=0.1)
    assert min(touched) >= 28
