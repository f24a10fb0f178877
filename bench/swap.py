"""What swapping brings: without it, planned, and as the published system does it, by latency, at one KV memory cap.

    python -m bench.swap --ranks 2 --latencies 64,256 --seconds 70 --window 40 model=llama-3-70b model.weights=dummy \
        kvcache.gpu_memory_gb=8.4 workload.source=fixed2000:512:0

All cells come from one process group; see bench/steady.py for how a cell is measured. The published scheme gets the
rounds and swap pages of the planned one before it, and so many main pages less as its slabs take more. On a CPU it is
left out.
"""

import torch

import deserve.kvcache.pages
from bench.published_swap import TwoSlabs
from bench.steady import Cell, launched, measure, parser, report, table
from deserve.comm.world import World
from deserve.kvcache.slab import SwapSlab


def published(plan: dict[str, int]) -> list[str]:
    """Overrides that give the published scheme the layout of `plan`, in the same memory."""
    keys = ("pipeline.rounds", "pipeline.micro_batch_size", "kvcache.swap_pages")
    words = [f"{key}={plan[key.split('.')[1]]}" for key in keys]
    # Two slabs of all layers instead of one of half of them.
    return [*words, f"kvcache.main_pages={plan['main_pages'] - 3 * plan['swap_pages'] // 2}"]


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--latencies", type=lambda text: text.split(","), default=["64"], help="one way, ms")
    options_parser.add_argument("--systems", default="none,planned,published")
    options = options_parser.parse_intermixed_args()
    options.output.mkdir(parents=True, exist_ok=True)
    launched("bench.swap", options.ranks)
    world, cells = World(), []
    systems = options.systems.split(",")
    if "published" in systems and "planned" not in systems[: systems.index("published")]:
        options_parser.error("--systems: published takes over the plan of planned, which must come before it")
    if not torch.cuda.is_available():
        systems = [system for system in systems if system != "published"]
    for latency in options.latencies:
        found: list[Cell] = []
        for system in systems:
            overrides = [f"network.latency_ms={latency}"]
            if system == "none":
                overrides.append("kvcache.swap_pages=0")
            if system == "published":
                overrides += world.share(f"{latency}/published", published(found[-1]["plan"]) if found else None)
            deserve.kvcache.pages.SwapSlab = TwoSlabs if system == "published" else SwapSlab
            cell = measure(world, f"{latency} ms, {system}", overrides, options)
            if cell is not None:
                found.append(cell)
                cells.append(cell)
                report(cells, options.output)
    world.leave()
    if cells:
        print(table(cells))


if __name__ == "__main__":
    main()
