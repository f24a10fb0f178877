"""Times of the GPU kernels: attention in its variants, then whole visits of a stack of layers against their floor.

Usage: python bench/kernels.py [decode] [prefill] [visits]    (all by default; prints Markdown tables)

Device times are medians of CUDA graph replays or of event pairs; contexts lie in pages dealt out at random, in more
memory than the L2 cache holds. The floor of a visit is the time of its matrix products alone, plus the bytes of
keys and values that it reads over the bandwidth of a device-to-device copy.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

sys.path.insert(0, str(Path(__file__).parents[1]))

from deserve.model.backend.base import Rows
from deserve.model.backend.flashinfer import FlashInferBackend
from deserve.model.config import ModelConfig, RopeScaling
from deserve.model.decoder import Decoder
from deserve.model.graphs import GraphedDecode, graph_batches
from deserve.model.weights import Shard, dummy_shard

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
LAYERS = 8
PAGE = 16

LLAMA_70B = ModelConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=LAYERS,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    max_context=8192,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(),
    tied_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    dtype=BF16,
)
LLAMA_8B = replace(LLAMA_70B, hidden_size=4096, intermediate_size=14336, num_heads=32)


def device_ms(run: Callable[[], Any], repeats: int = 30) -> float:
    """Milliseconds of device time of `run`, the median of `repeats`."""
    times = []
    for _ in range(repeats + 2):
        # A sleeping device lets the host get ahead, so that no gap between launches is measured.
        torch.cuda._sleep(4_000_000)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in times[2:])


def graph_ms(run: Callable[[], Any], repeats: int = 30) -> float:
    """The same for `run` captured in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return device_ms(graph.replay, repeats)


def host_ms(run: Callable[[], Any], repeats: int = 10) -> float:
    """Milliseconds until `run` returns to an idle device's host, the median of `repeats`."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[2:])


def table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    print(f"\n### {title}\n")
    for row in (header, ["---"] * len(header), *rows):
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def copy_bandwidth() -> float:
    """Bytes read and written per second in a copy of 4 GB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (device_ms(lambda: target.copy_(source)) / 1e3)


def page_lists(rows: int, context: int, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """First page of each row, pages, tokens in the last page (int32, on the host), and the number of pages."""
    each = -(-context // page)
    pages = np.random.default_rng(0).permutation(rows * each).astype(np.int32)
    last = np.full(rows, context - (each - 1) * page, np.int32)
    indptr = each * np.arange(rows + 1, dtype=np.int32)
    return torch.from_numpy(indptr), torch.from_numpy(pages), torch.from_numpy(last), rows * each


def decode_us(
    rows: int, context: int, heads: int, kv_heads: int, page: int, variant: str, cores: bool, layout: str = "NHD"
) -> float:
    indptr, pages, last, count = page_lists(rows, context, page)
    shape = (count, 2, page, kv_heads, 128) if layout == "NHD" else (count, 2, kv_heads, page, 128)
    kv = torch.randn(shape, dtype=BF16, device=DEVICE)
    q = torch.randn(rows, heads, 128, dtype=BF16, device=DEVICE)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    attention = BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores=cores, backend=variant)
    attention.plan(indptr, pages, last, heads, kv_heads, 128, page, q_data_type=BF16, kv_data_type=BF16)
    out = torch.empty_like(q)
    return 1e3 * graph_ms(lambda: attention.run(q, kv, out=out))


def decode_variants() -> None:
    lines = []
    for rows, context, heads in ((128, 1024, 64), (32, 512, 64), (128, 1024, 32), (8, 4096, 64)):
        cases = [("fa2", True, page, "NHD") for page in (1, 8, 16, 32, 64)] + [("fa2", True, 16, "HND")]
        cases.append(("fa2", False, 16, "NHD"))
        if rows == 128:
            cases.append(("fa3", True, 16, "NHD"))
        for variant, cores, page, layout in cases:
            try:
                us = decode_us(rows, context, heads, 8, page, variant, cores, layout)
            except Exception as error:
                print(f"{variant} {cores} {page}: {error!r}"[:300])
                continue
            rate = rows * context * LLAMA_70B.kv_bytes_per_token_per_layer(BF16) / us / 1e6
            kernel = f"{variant}, tensor cores" if cores else "CUDA cores"
            lines.append([f"{rows} x {context}", f"{heads}/8", kernel, page, layout, f"{us:.0f}", f"{rate:.2f}"])
    table("Decode attention", ["sequences", "heads", "kernel", "page size", "layout", "us", "TB/s"], lines)


def prefill_us(variant: str, rows: int, new: int, context: int, heads: int) -> list[str]:
    """Device time of the call, and host time of its plan."""
    indptr, pages, last, count = page_lists(rows, context + new, PAGE)
    kv = torch.randn(count, 2, PAGE, 8, 128, dtype=BF16, device=DEVICE)
    q = torch.randn(rows * new, heads, 128, dtype=BF16, device=DEVICE)
    queries = new * torch.arange(rows + 1, dtype=torch.int32)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    attention = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=variant)

    def plan() -> None:
        attention.plan(queries, indptr, pages, last, heads, 8, 128, PAGE, causal=True, q_data_type=BF16)

    plan()
    out = torch.empty_like(q)
    return [f"{1e3 * graph_ms(lambda: attention.run(q, kv, out=out)):.0f}", f"{1e3 * host_ms(plan, 5):.0f}"]


def prefill_variants() -> None:
    cases = [(1, 512, 0), (1, 512, 1536), (4, 128, 0), (16, 32, 512), (2, 192, 256), (1, 4096, 0)]
    lines = []
    for heads in (64, 32):
        for rows, new, context in cases:
            times = prefill_us("fa2", rows, new, context, heads) + prefill_us("fa3", rows, new, context, heads)
            lines.append([f"{rows} x {new} after {context}", f"{heads}/8", *times])
    table("Prefill attention (us)", ["sequences", "heads", "fa2", "its plan", "fa3", "its plan"], lines)


class Stack:
    """A stack of layers, and pages full of keys and values for as many rows as are to be visited."""

    ROWS, WIDTH = 256, 640 // PAGE  # of 640 tokens

    def __init__(self, config: ModelConfig):
        self.config = config
        pages = self.ROWS * self.WIDTH
        self.kv = torch.empty(
            LAYERS, pages + 1, 2, PAGE, config.num_kv_heads, config.head_dim, dtype=BF16, device=DEVICE
        )
        for layer in self.kv:
            layer.normal_()
        self.pages = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(self.ROWS, self.WIDTH)
        self.weights = dummy_shard(config, Shard(0, LAYERS, False, False), DEVICE, BF16)
        self.decoders = {variant: Decoder(config, self.weights, self.backend(variant)) for variant in ("fa2", "fa3")}
        self.graphs = GraphedDecode(self.decoders["fa2"], self.kv, pages, graph_batches(self.ROWS))

    def backend(self, variant: str) -> FlashInferBackend:
        return FlashInferBackend(
            self.config, BF16, DEVICE, 8192, PAGE, self.ROWS, 1024, self.ROWS * self.WIDTH, variant
        )

    def rows(self, decodes: int, prefills: list[tuple[int, int]]) -> Rows:
        """`decodes` rows of one token after 511, and rows of (new tokens, tokens before them)."""
        new = [1] * decodes + [new for new, _ in prefills]
        context = [511] * decodes + [before for _, before in prefills]
        return Rows(np.array(new, np.int32), np.array(context, np.int32), self.pages[: len(new)])

    def products(self, x: torch.Tensor, attended: torch.Tensor, activated: torch.Tensor) -> None:
        """The matrix products of a visit and nothing else, of [T, hidden], [T, q_size] and [T, intermediate]."""
        for layer in self.weights.layers:
            F.linear(x, layer.qkv)
            F.linear(attended, layer.output)
            F.linear(x, layer.gate_up)
            F.linear(activated, layer.down)

    @torch.inference_mode()
    def eager(self, variant: str, rows: Rows, x: torch.Tensor) -> None:
        decoder = self.decoders[variant]
        decoder.backend.begin_visit(rows)
        decoder.forward(x.clone(), self.kv)

    def line(self, rows: Rows, bandwidth: float) -> list[Any]:
        tokens = int(rows.new_tokens.sum())
        x, attended, activated = (
            torch.randn(tokens, size, dtype=BF16, device=DEVICE)
            for size in (self.config.hidden_size, self.config.q_size, self.config.intermediate_size)
        )
        read = int((rows.context + rows.new_tokens).sum()) * self.config.kv_bytes_per_token_per_layer(BF16)
        products = graph_ms(lambda: self.products(x, attended, activated)) / LAYERS
        floor = products + 1e3 * read / bandwidth
        cells: list[Any] = [1e3 * products, 1e3 * floor]
        for variant in ("fa2", "fa3"):
            each = device_ms(lambda variant=variant: self.eager(variant, rows, x)) / LAYERS
            cells += [1e3 * each, each / floor]
        hosts = [
            host_ms(lambda: self.decoders["fa2"].backend.begin_visit(rows)),
            host_ms(lambda: self.eager("fa2", rows, x)),
        ]
        if self.graphs.fits(rows):
            each = device_ms(lambda: self.graphs.replay(rows, x)) / LAYERS
            cells += [1e3 * each, each / floor]
            hosts.append(host_ms(lambda: self.graphs.replay(rows, x)))
        else:
            cells += ["", ""]
            hosts.append("")
        return [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells + hosts]


def visits() -> None:
    bandwidth = copy_bandwidth()
    print(f"\nCopy bandwidth: {bandwidth / 1e12:.2f} TB/s")
    lines = []
    for name, config in (("70B", LLAMA_70B), ("8B", LLAMA_8B)):
        stack = Stack(config)
        print(
            f"\n{name}: {len(graph_batches(stack.ROWS))} graphs of {LAYERS} layers take {stack.graphs.bytes >> 20} MB"
        )
        for what, decodes, prefills in (
            ("32 decode", 32, []),
            ("128 decode", 128, []),
            ("256 decode", 256, []),
            ("128 decode + 2 x 192 prefill", 128, [(192, 256)] * 2),
            ("32 decode + 480 prefill", 32, [(480, 0)]),
            ("512 prefill", 0, [(512, 0)]),
        ):
            lines.append([name, what, *stack.line(stack.rows(decodes, prefills), bandwidth)])
        del stack
        torch.cuda.empty_cache()
    header = ["model", "visit", "products", "floor", "eager", "/ floor", "fa3 prefill", "/ floor", "graph", "/ floor"]
    header += ["begin_visit", "eager", "replay"]
    table(f"Visits of {LAYERS} layers: us of device per layer; last three: ms of host per visit", header, lines)


def main() -> None:
    chosen = sys.argv[1:] or ["decode", "prefill", "visits"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, part in (("decode", decode_variants), ("prefill", prefill_variants), ("visits", visits)):
        if name in chosen:
            part()


if __name__ == "__main__":
    main()
