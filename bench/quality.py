"""What `model.quantise` costs in quality: perplexity on a text, and how often the likeliest next token stays the same.

    python -m bench.quality TEXT... [--model smollm2-135m] [--tokens 20000] [--window 1024]

The texts, laid end to end, are read in windows that know nothing of each other, in float32 on the CPU.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.timing import table
from deserve.config import ModelSection, load_config
from deserve.kvcache.pages import KVPages
from deserve.layout import Shard
from deserve.model.backend.base import Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.checkpoint import resolve
from deserve.model.decoder import Decoder
from deserve.model.schemes.rounded import FORMS
from deserve.model.tokenizer import load_tokenizer
from deserve.model.weights import load_shard

PAGE_SIZE = 16  # tokens
CPU = torch.device("cpu")


def predictions(section: ModelSection, ids: torch.Tensor, window: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each window of `ids`: the log-probability of every token but the first, and the likeliest in its place."""
    checkpoint = resolve(section)
    config, folder = checkpoint.config, checkpoint.folder
    assert folder is not None
    weights = load_shard(folder, config, Shard(0, config.num_layers, True, True), CPU, torch.float32)
    backend = TorchBackend(config, torch.float32, CPU, config.max_context)
    decoder, pages = Decoder(config, weights, backend), -(-window // PAGE_SIZE)
    spec = config.kv_spec(torch.float32)
    kv = KVPages(spec, config.num_layers, page_size=PAGE_SIZE, main_pages=pages, device=CPU)
    for tokens in ids.split(window):
        rows = Rows(np.array([len(tokens)], np.int32), np.zeros(1, np.int32), [np.arange(pages, dtype=np.int32)[None]])
        backend.begin_visit(rows)
        logits = decoder.logits(decoder.forward(decoder.embed(tokens), kv))[:-1]
        yield logits.log_softmax(1).gather(1, tokens[1:, None])[:, 0], logits.argmax(1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1024)
    arguments = parser.parse_args()
    section = load_config([f"model={arguments.model}"]).model
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in arguments.texts)
    ids = torch.tensor(load_tokenizer(resolve(section)).encode(text)[: arguments.tokens])
    lines, first = [], torch.empty(0)
    for quantise in (None, *FORMS):
        found = list(predictions(replace(section, quantise=quantise), ids, arguments.window))
        scores, likeliest = (torch.cat(parts) for parts in zip(*found, strict=True))
        first = likeliest if quantise is None else first
        equal = (likeliest == first).float().mean()
        lines.append([str(quantise), f"{math.exp(-scores.mean()):.3f}", f"{100 * equal:.1f} %"])
    title = f"{arguments.model}: {len(ids)} tokens of {', '.join(path.name for path in arguments.texts)}"
    table(title, ["model.quantise", "perplexity", "same likeliest token"], lines)


if __name__ == "__main__":
    main()
