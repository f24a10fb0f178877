"""Times of the attention kernels in their variants.

    python -m bench.kernels [decode] [prefill]    (both by default; prints Markdown tables)

Device times are medians of CUDA graph replays; contexts lie in pages dealt out at random, in more memory than the L2
cache holds.
"""

import sys

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

from bench.timing import graph_ms, host_ms, table

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
PAGE = 16
HEAD_DIM = 128


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
    shape = (count, 2, page, kv_heads, HEAD_DIM) if layout == "NHD" else (count, 2, kv_heads, page, HEAD_DIM)
    kv = torch.randn(shape, dtype=BF16, device=DEVICE)
    q = torch.randn(rows, heads, HEAD_DIM, dtype=BF16, device=DEVICE)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    attention = BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores=cores, backend=variant)
    attention.plan(indptr, pages, last, heads, kv_heads, HEAD_DIM, page, q_data_type=BF16, kv_data_type=BF16)
    out = torch.empty_like(q)
    return 1e3 * graph_ms(lambda: attention.run(q, kv, out=out), DEVICE)


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
            rate = rows * context * 2 * 8 * HEAD_DIM * BF16.itemsize / us / 1e6
            kernel = f"{variant}, tensor cores" if cores else "CUDA cores"
            lines.append([f"{rows} x {context}", f"{heads}/8", kernel, page, layout, f"{us:.0f}", f"{rate:.2f}"])
    table("Decode attention", ["sequences", "heads", "kernel", "page size", "layout", "us", "TB/s"], lines)


def prefill_us(variant: str, rows: int, new: int, context: int, heads: int) -> list[str]:
    """Device time of the call, and host time of its plan."""
    indptr, pages, last, count = page_lists(rows, context + new, PAGE)
    kv = torch.randn(count, 2, PAGE, 8, HEAD_DIM, dtype=BF16, device=DEVICE)
    q = torch.randn(rows * new, heads, HEAD_DIM, dtype=BF16, device=DEVICE)
    queries = new * torch.arange(rows + 1, dtype=torch.int32)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    attention = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=variant)

    def plan() -> None:
        attention.plan(queries, indptr, pages, last, heads, 8, HEAD_DIM, PAGE, causal=True, q_data_type=BF16)

    plan()
    out = torch.empty_like(q)
    return [
        f"{1e3 * graph_ms(lambda: attention.run(q, kv, out=out), DEVICE):.0f}",
        f"{1e3 * host_ms(plan, DEVICE, 5):.0f}",
    ]


def prefill_variants() -> None:
    cases = [(1, 512, 0), (1, 512, 1536), (4, 128, 0), (16, 32, 512), (2, 192, 256), (1, 4096, 0)]
    lines = []
    for heads in (64, 32):
        for rows, new, context in cases:
            times = prefill_us("fa2", rows, new, context, heads) + prefill_us("fa3", rows, new, context, heads)
            lines.append([f"{rows} x {new} after {context}", f"{heads}/8", *times])
    table("Prefill attention (us)", ["sequences", "heads", "fa2", "its plan", "fa3", "its plan"], lines)


def main() -> None:
    chosen = sys.argv[1:] or ["decode", "prefill"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, part in (("decode", decode_variants), ("prefill", prefill_variants)):
        if name in chosen:
            part()


if __name__ == "__main__":
    main()
