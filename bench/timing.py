"""How long work takes on a device and on its host, and what the device can do at most; for the benchmarks."""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

REPEATS = 30
AHEAD_CYCLES = 10_000_000  # about 5 ms, longer than a host takes for any of the calls timed here
LASTING_S = 2.0
LASTING_PRODUCTS = 100  # about 150 ms, in which a pause of 5 ms does not count


def device_ms(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Milliseconds of device time of `run`, the median of `repeats`; of a CPU, wall-clock time."""
    if device.type != "cuda":
        return host_ms(run, device, repeats)
    times = []
    for _ in range(repeats + 2):
        # A sleeping device lets the host get ahead, so that no gap between launches is measured.
        torch.cuda._sleep(AHEAD_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in times[2:])


def graph_ms(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """The same for `run` captured in a CUDA graph, where there are such."""
    if device.type != "cuda":
        return host_ms(run, device, repeats)
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return device_ms(graph.replay, device, repeats)


def host_ms(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Milliseconds until `run` returns to the host of an idle device, the median of `repeats`."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[2:])


def copy_bandwidth(device: torch.device, repeats: int = REPEATS) -> float:
    """Bytes read and written per second in a copy of 4 GB, of 256 MB on a CPU."""
    size = 4 << 30 if device.type == "cuda" else 256 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / (device_ms(lambda: target.copy_(source), device, repeats) / 1e3)


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> float:
    """Operations per second in the product of two square matrices of 8,192, on a CPU of 2,048.

    Their content is random: of zeros a GPU multiplies more, since it takes less power for them.
    """
    size, product = _product(device, dtype)
    return 2 * size**3 / (device_ms(product, device, repeats) / 1e3)


def lasting_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The same of products without a pause, after two seconds of them: a GPU at the limit of its power clocks down."""
    size, product = _product(device, dtype)
    begin = time.monotonic()
    while time.monotonic() < begin + LASTING_S:
        took_ms = device_ms(lambda: [product() for _ in range(LASTING_PRODUCTS)], device, repeats=1)
    return LASTING_PRODUCTS * 2 * size**3 / (took_ms / 1e3)


def _product(device: torch.device, dtype: torch.dtype) -> tuple[int, Callable[[], Any]]:
    """The side of two square matrices, and their product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return size, lambda: torch.mm(a, b, out=out)


def table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Print `rows` in Markdown."""
    print(f"\n### {title}\n")
    for row in (header, ["---"] * len(header), *rows):
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()
