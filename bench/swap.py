"""What swapping brings: without it and as planned, by latency, at one KV memory cap.

    python -m bench.swap --ranks 2 --latencies 64,256 --seconds 70 --window 40 model=llama-3-70b model.weights=dummy \
        kvcache.gpu_memory_gb=8.4 workload.source=fixed2000:512:0

All cells come from one process group; see bench/steady.py for how a cell is measured.
"""

from bench.steady import Cell, launched, measure, parser, report, table
from deserve.comm.world import World


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--latencies", type=lambda text: text.split(","), default=["64"], help="one way, ms")
    options = options_parser.parse_intermixed_args()
    options.output.mkdir(parents=True, exist_ok=True)
    launched("bench.swap", options.ranks)
    world = World()
    cells: list[Cell] = []
    for latency in options.latencies:
        for system, overrides in (("no swapping", ["kvcache.swap_pages=0"]), ("planned", [])):
            overrides = [f"network.latency_ms={latency}", *overrides]
            cell = measure(world, f"{latency} ms, {system}", overrides, options)
            if cell is not None:
                cells.append(cell)
                report(cells, options.output)
    world.leave()
    if cells:
        print(table(cells))


if __name__ == "__main__":
    main()
