"""Small random checkpoints, written by transformers' own classes, for tests to compare with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deserve.layout import Shard
from deserve.model.config import parse_config
from deserve.model.packed import Form
from deserve.model.weights import fill_dummy, tensor_shapes

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "gpt_oss": "GptOss",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "gemma3-images": "Gemma3",
}
# The rest of a model that reads images too, as small as can be
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION |= {"image_size": 28, "patch_size": 14}
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    shard_size: str = "1GB",
    std: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a random model of `family` (a key of FAMILIES) in `folder`, and return it.

    Every weight, norms and biases included, is drawn anew, and widely enough (`std`) for greedy outputs to
    vary. `overrides` go into its config; a small `shard_size` (`100KB`) gives several files and an index.
    """
    import transformers

    options = SHAPE | ({"sliding_window": None} if family == "mistral" else {}) | overrides
    name, whole = FAMILIES[family], "ForCausalLM"
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**options)
    if family == "gemma3-images":
        config = transformers.Gemma3Config(text_config=config.to_dict(), vision_config=VISION, mm_tokens_per_image=1)
        whole = "ForConditionalGeneration"
    model = getattr(transformers, f"{name}{whole}")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") and not family.startswith("gemma") else 0.0
            parameter.normal_(mean, std, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_dummy(raw: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """Write what `dummy_shard` makes on the CPU, for the config.json `raw`, as a checkpoint in `folder`."""
    config = parse_config(raw, "raw")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, shape in tensor_shapes(config, Shard(0, config.num_layers, True, True)).items():
        weights[name] = torch.empty(shape, dtype=config.dtype)
        fill_dummy(name, weights[name], seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # transformers chooses its class by the model type
    model_type = raw["architectures"][0].removesuffix("ForCausalLM").lower()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | raw))
    return folder


def reference_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """transformers' own model of a folder, ready to compare with: eager attention, on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return (model if dtype is None else model.to(dtype)).eval()


def reference_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens after `prompt`, end-of-text ignored; each from a forward without any cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a tokenizer of single bytes (ids 0..255 in GPT-2's order) and a few special tokens from 256 on.

    It puts `<|begin|>` (257) before a text, and ends it with `<|end|>` (256).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|end|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 257)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def forms(group: int) -> dict[str, Form]:
    """Layouts of packed weights by name; `group` inputs share a scale in int4 and in the blocks of fp8."""
    return {
        "int4": Form("int4", columns=group),
        "int4-zeros": Form("int4", columns=32, zeros=True),
        "int4-channel": Form("int4"),
        "int8": Form("int8"),
        "int8-zeros": Form("int8", columns=64, zeros=True),
        "fp8-tensor": Form("fp8", rows=None),
        "fp8-channel": Form("fp8"),
        "fp8-blocks": Form("fp8", group, group),
        "fp4": Form("fp4", columns=32),
    }
