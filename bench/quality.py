"""What 8 and 4 bits cost in quality: perplexity on a text, and how often the likeliest next token stays the same.

    python -m bench.quality TEXT... [--model smollm2-135m] [--tokens 20000] [--window 1024]

Weights (`model.quantise`), KV pages (`kvcache.dtype`) and hidden states between two ranks (`comm.activations`), each
alone. The texts, laid end to end, are read in windows that know nothing of each other, in float32 on the CPU.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.timing import table
from deserve.comm.coding import decode, encode
from deserve.config import ModelSection, load_config
from deserve.kvcache.pages import KVPages
from deserve.layout import Shard
from deserve.model.backend.base import Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.checkpoint import resolve
from deserve.model.decoder import Decoder
from deserve.model.kv_scale import fold_scales
from deserve.model.schemes.rounded import FORMS
from deserve.model.tokenizer import load_tokenizer
from deserve.model.weights import load_shard

PAGE_SIZE = 16  # tokens
CPU, FLOAT = torch.device("cpu"), torch.float32
PLAIN, PAGES, ACTIVATIONS = "as it is", "kvcache.dtype=fp8", "comm.activations=fp8"


def predictions(
    section: ModelSection, ids: torch.Tensor, window: int, coded: str = PLAIN
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each window of `ids`: the log-probability of every token but the first, and the likeliest in its place.

    The model is two shards; `coded`, `PAGES` or `ACTIVATIONS`, is in fp8.
    """
    checkpoint = resolve(section)
    config, folder, half = checkpoint.config, checkpoint.folder, checkpoint.config.num_layers // 2
    assert folder is not None
    fp8_pages, pages = coded == PAGES, -(-window // PAGE_SIZE)
    backend = TorchBackend(config, FLOAT, CPU, config.max_context, fp8_pages)
    shards = []
    for shard in (Shard(0, half, True, False), Shard(half, config.num_layers, False, True)):
        weights = load_shard(folder, config, shard, CPU, FLOAT)
        for layer in weights.layers if fp8_pages else ():
            fold_scales(layer, config)
        spec, layers = config.kv_spec(FLOAT, fp8_pages), shard.last - shard.first
        kv = KVPages(spec, layers, page_size=PAGE_SIZE, main_pages=pages, device=CPU)
        shards.append((Decoder(config, weights, backend), kv))
    (first, first_kv), (last, last_kv) = shards
    for tokens in ids.split(window):
        rows = Rows(np.array([len(tokens)], np.int32), np.zeros(1, np.int32), [np.arange(pages, dtype=np.int32)[None]])
        backend.begin_visit(rows)
        x = first.forward(first.embed(tokens), first_kv)
        if coded == ACTIVATIONS:
            x = decode(encode(x), config.hidden_size, FLOAT)
        logits = last.logits(last.forward(x, last_kv))[:-1]
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
    ways = {coded: (section, coded) for coded in (PLAIN, PAGES, ACTIVATIONS)}
    ways |= {f"model.quantise={form}": (replace(section, quantise=form), PLAIN) for form in FORMS}
    for name, (model, coded) in ways.items():
        found = list(predictions(model, ids, arguments.window, coded))
        scores, likeliest = (torch.cat(parts) for parts in zip(*found, strict=True))
        first = likeliest if name == PLAIN else first
        equal = (likeliest == first).float().mean()
        lines.append([name, f"{math.exp(-scores.mean()):.3f}", f"{100 * equal:.1f} %"])
    title = f"{arguments.model}: {len(ids)} tokens of {', '.join(path.name for path in arguments.texts)}"
    table(title, ["", "perplexity", "same likeliest token"], lines)


if __name__ == "__main__":
    main()
