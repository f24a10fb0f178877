"""What the hardware allows, beside what is measured: of the visits of a stage, and of a whole run.

    python -m bench.roofline [MODEL ...] [--layers 8] [--context 512] [--decode 32 128 256] [--mixed 0 32 128]
    python -m bench.roofline --end-to-end outputs/metrics.json

The first form times visits of `--layers` layers with random weights, by the kernels that a run takes: of so many decode
rows (`--decode`), each with its context (`--context`, tokens with the new one), and of `--tokens` tokens, of which so
many are decode rows (`--mixed`) and the rest the beginning of a prompt. Beside each visit stand

- bare: every matrix product takes the longer of its weights' bytes over the bandwidth and its operations over the
  matrix rate, and the keys and values that the visit reads are added, over the bandwidth;
- floor: the matrix products alone, timed at that number of tokens, and the same keys and values.

The second form reads what a run, on this kind of device, wrote into its metrics.json.

Bandwidth (bytes read and written per second in a large copy) and matrix rate are measured at the start, the latter of
single products, as visits are here, and of a GPU also after two seconds of them: the limit of a run is nearer to that.
Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.timing import (
    REPEATS,
    copy_bandwidth,
    device_ms,
    graph_ms,
    host_ms,
    lasting_matrix_rate,
    matrix_rate,
    table,
)
from deserve.config import ModelSection, load_config
from deserve.errors import UserError
from deserve.kvcache.pages import KVPages
from deserve.layout import Layout, Shard
from deserve.model.backend.base import Rows
from deserve.model.checkpoint import model_dtype, resolve
from deserve.model.config import ExpertConfig, ModelConfig
from deserve.model.decoder import Decoder
from deserve.model.graphs import Graphs, capture
from deserve.model.layer import MLP
from deserve.model.linear import LinearSpec
from deserve.model.weights import dummy_shard, layer_parts
from deserve.stage import make_backend

PAGE = 16  # tokens


@dataclass(frozen=True)
class Peak:
    """What a device does at most: bytes and operations per second."""

    bandwidth: float
    rate: float

    def product_s(self, weight: tuple[int, int], itemsize: int, tokens: float) -> float:
        """Seconds of `tokens` tokens times a matrix of the shape `weight`."""
        elements = weight[0] * weight[1]
        return max(elements * itemsize / self.bandwidth, 2 * elements * tokens / self.rate)

    def experts_s(self, experts: ExpertConfig, weights: int, itemsize: int, tokens: float) -> float:
        """The same for all experts' matrices of one kind, `weights` elements, of which those are read that are used."""
        read, used = experts.touched(tokens) / experts.count, experts.active / experts.count
        return max(read * weights * itemsize / self.bandwidth, 2 * used * weights * tokens / self.rate)

    def layer_s(self, config: ModelConfig, itemsize: int, tokens: float) -> float:
        """Seconds of a layer's products."""
        seconds = 0.0
        for spec in layer_parts(config, 0).values():
            if isinstance(spec, LinearSpec):
                shape = (sum(size for _, size in spec.modules), spec.inputs)
                experts = config.experts if spec.experts else None
                seconds += (
                    self.experts_s(experts, shape[0] * shape[1], itemsize, tokens)
                    if experts
                    else self.product_s(shape, itemsize, tokens)
                )
        return seconds


def layer_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Shapes [out, in] of a dense layer's matrices."""
    if config.experts is not None:
        raise SystemExit("shares of a run are not done for mixtures of experts: measure visits")
    linears = (spec for spec in layer_parts(config, 0).values() if isinstance(spec, LinearSpec))
    return [(sum(size for _, size in linear.modules), linear.inputs) for linear in linears]


@dataclass(frozen=True)
class Visit:
    """`decodes` rows of one token, the last of `context`, and the first `prefill` tokens of a prompt."""

    decodes: int
    context: int
    prefill: int

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefill

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values are read."""
        return self.decodes * self.context + self.prefill

    def __str__(self) -> str:
        decodes = f"{self.decodes} decode of {self.context}" if self.decodes else ""
        prefill = f"{self.prefill} prefill" if self.prefill else ""
        return " + ".join(filter(None, (decodes, prefill)))


class Stack:
    """Layers of a stage in the middle of the ring, and pages full of keys and values for `visits`."""

    def __init__(
        self, config: ModelConfig, layers: int, dtype: torch.dtype, device: torch.device, visits: Sequence[Visit]
    ):
        self.layers, self.dtype, self.device = layers, dtype, device
        self.config = config
        count = max(visit.decodes + (visit.prefill > 0) for visit in visits)
        width = -(-max(max(visit.context, visit.prefill) for visit in visits) // PAGE)
        pages = count * width
        spec = config.kv_spec(dtype)
        self.kv = KVPages(spec, layers, page_size=PAGE, main_pages=pages, device=device)
        for layer in self.kv.layers:
            layer.memory.normal_()
        self.pages = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(count, width)
        most = max(visit.tokens for visit in visits)
        plan = Layout((0,), 1, count, count, most, "vanilla", PAGE, pages, 0, 0)
        weights = dummy_shard(config, Shard(0, layers, False, False), device, dtype)
        self.decoder = Decoder(config, weights, make_backend(config, plan, dtype, device))
        self.graphs: Graphs | None = None
        if self.decoder.backend.captures:
            self.graphs = capture(self.decoder, self.kv, count, most)

    def rows(self, visit: Visit) -> Rows:
        new, context = [1] * visit.decodes, [visit.context - 1] * visit.decodes
        if visit.prefill:
            new, context = [*new, visit.prefill], [*context, 0]
        return Rows(np.array(new, np.int32), np.array(context, np.int32), [self.pages[: len(new)]])

    def products(self, x: torch.Tensor, attended: torch.Tensor, activated: torch.Tensor) -> None:
        """The matrix products of a visit and nothing else, of [T, hidden], [T, q_size] and [T, intermediate]."""
        for layer in self.decoder.weights.layers:
            layer.attention.qkv(x)
            layer.attention.output(attended)
            if isinstance(layer.mlp, MLP):
                layer.mlp.gate_up(x)
                layer.mlp.down(activated)
            else:  # with what sorts the tokens
                layer.mlp(x, self.decoder.backend)

    def eager(self, rows: Rows, x: torch.Tensor) -> None:
        self.decoder.backend.begin_visit(rows)
        self.decoder.forward(x.clone(), self.kv)

    @torch.inference_mode()
    def line(self, visit: Visit, peak: Peak, repeats: int) -> list[str]:
        """A visit's cells of the table, from `HEADER`'s second on."""
        config, rows = self.config, self.rows(visit)
        x, attended, activated = (
            torch.randn(visit.tokens, size, dtype=self.dtype, device=self.device)
            for size in (config.hidden_size, config.q_size, config.intermediate_size)
        )
        kv_ms = 1e3 * visit.kv_tokens * config.kv_spec(self.dtype).token_bytes / peak.bandwidth
        bare = 1e3 * peak.layer_s(config, self.dtype.itemsize, visit.tokens) + kv_ms
        alone = graph_ms(lambda: self.products(x, attended, activated), self.device, repeats) / self.layers
        floor = alone + kv_ms

        how, run = "eager", lambda: self.eager(rows, x)
        if self.graphs is not None and self.graphs.decode.fits(rows):
            how, run = "graph", lambda: self.graphs.decode.replay(rows, x)
        elif self.graphs is not None and self.graphs.others.fits(rows):
            how, run = "graphs", lambda: self.graphs.others.replay(rows, x)
        whole = device_ms(run, self.device, repeats)
        host = host_ms(run, self.device, repeats) if self.device.type == "cuda" else whole  # a CPU is its own host
        took = whole / self.layers
        return [
            str(visit),
            how,
            *(f"{1e3 * ms:.1f}" for ms in (bare, alone, floor, took)),
            f"{took / floor:.2f}",
            f"{took / bare:.2f}",
            f"{whole:.2f}",
            f"{host:.2f}",
        ]


HEADER = ["model", "visit", "by", "bare", "products", "floor", "measured", "/ floor", "/ bare", "device ms", "host ms"]


def visits(arguments: argparse.Namespace) -> list[Visit]:
    """The visits that the command line asks for."""
    found = [Visit(decodes, context, 0) for context in arguments.context for decodes in arguments.decode]
    for context in arguments.context:
        found += [Visit(decodes, context, arguments.tokens - decodes) for decodes in arguments.mixed if decodes]
    return found + [Visit(0, 0, arguments.tokens)] * (0 in arguments.mixed)


@dataclass(frozen=True)
class Share:
    """What one rank did in a run, and the output tokens/s that the hardware allows it.

    `by_rate`, `by_bandwidth`: with operations, or bytes, alone. `by_both`: every visit takes the bare limit of a visit
    of mean size.
    """

    layers: int
    visits: int
    tokens: float  # in a visit
    busy: float
    by_rate: float
    by_bandwidth: float
    by_both: float


def shares(metrics: dict[str, Any], peak: Peak, config: ModelConfig, dtype: torch.dtype) -> list[Share]:
    """The ranks of the run that wrote `metrics`, its requests taken to be all of mean length.

    What was not answered (in a run cut short) counts as not computed. Keys and values of a prompt are read once.
    """
    answered = metrics["requests"] - metrics["errors"]
    outputs = metrics["output_tokens"]
    prompt, answer = metrics["input_tokens"] / answered, outputs / answered
    computed = prompt + answer - 1  # of a request; its last token is not
    pairs = computed * (computed + 1) / 2
    kv_tokens = prompt * answer + answer * (answer - 1) / 2  # read for a request: once at the prompt, then each step
    partition = metrics["plan"]["partition"]
    ends = [*partition[1:], config.num_layers]
    found = []
    for rank, (first, end, stage) in enumerate(zip(partition, ends, metrics["stages"], strict=True)):
        layers, count = end - first, stage["visits"]
        # Each matrix with the tokens that it multiplies in the whole run.
        matrices = [(shape, answered * computed) for shape in layer_matrices(config) * layers]
        if rank == len(partition) - 1:
            matrices.append(((config.vocab_size, config.hidden_size), outputs))
        operations = sum(2 * out * size * tokens for (out, size), tokens in matrices)
        operations += answered * 4 * config.q_size * pairs * layers
        weights = sum(out * size for (out, size), _ in matrices) * dtype.itemsize
        kv = answered * kv_tokens * config.kv_spec(dtype).token_bytes * layers
        both_s = kv / peak.bandwidth
        both_s += sum(count * peak.product_s(shape, dtype.itemsize, tokens / count) for shape, tokens in matrices)
        found.append(
            Share(
                layers,
                count,
                answered * computed / count,
                stage["busy"],
                outputs / (operations / peak.rate),
                outputs / ((count * weights + kv) / peak.bandwidth),
                outputs / both_s,
            )
        )
    return found


def end_to_end(path: Path, device: torch.device, bandwidth: float, repeats: int) -> None:
    """Print a run's output tokens/s beside what the hardware allows. Raises UserError where its model is not there."""
    metrics = json.loads(path.read_text())
    section = ModelSection(**metrics["config"]["model"])
    config = resolve(replace(section, weights="dummy")).config
    dtype = model_dtype(section, config)
    peak = Peak(bandwidth, matrix_rate(device, dtype, repeats))
    ranks = shares(metrics, peak, config, dtype)
    rate = metrics["output_tokens_per_s"]
    answered = metrics["requests"] - metrics["errors"]
    print(
        f"\n{section.name}: {answered:,} requests of {metrics['input_tokens'] / answered:,.0f} tokens in and "
        f"{metrics['output_tokens'] / answered:,.0f} out in {metrics['elapsed_s']:,.1f} s: {rate:,.1f} output tokens/s"
        + (f", {metrics['after_warmup']['output_tokens_per_s']:,.1f} after warm-up" if metrics["warmup_s"] else "")
        + f"\nMatrix rate ({str(dtype).removeprefix('torch.')}): {peak.rate / 1e12:.2f} TFLOP/s"
    )
    lines = [
        [rank, share.layers, f"{share.visits:,}", f"{share.tokens:.1f}", f"{100 * share.busy:.0f} %"]
        + [f"{limit:,.0f}" for limit in (share.by_rate, share.by_bandwidth, share.by_both)]
        + [f"{100 * rate / share.by_both:.0f} %"]
        for rank, share in enumerate(ranks)
    ]
    header = ["rank", "layers", "visits", "tokens a visit", "busy"]
    header += ["matrix rate alone", "bandwidth alone", "bare visits", "reached of it"]
    table("Output tokens/s that the hardware allows each rank", header, lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of conf/model; llama-3-8b and llama-3-70b if none")
    parser.add_argument("--layers", type=int, default=8, help="of the stage")
    parser.add_argument("--context", type=int, nargs="+", default=[512], help="tokens of each decode row")
    parser.add_argument("--decode", type=int, nargs="*", default=[32, 128, 256], help="rows of the decode visits")
    parser.add_argument("--mixed", type=int, nargs="*", default=[128, 32, 0], help="decode rows of the other visits")
    parser.add_argument("--tokens", type=int, default=512, help="of the other visits")
    parser.add_argument("--end-to-end", type=Path, metavar="METRICS.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args(words)
    if any(not 0 <= decodes < arguments.tokens for decodes in arguments.mixed):
        parser.error("--mixed: a visit of --tokens tokens has fewer decode rows than tokens")
    if not (arguments.decode or arguments.mixed):
        parser.error("--decode and --mixed: no visit is left")
    device, repeats = torch.device(arguments.device), arguments.repeats
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = copy_bandwidth(device, repeats)
    print(f"{name}, torch {torch.__version__}\nCopy bandwidth: {bandwidth / 1e12:.3f} TB/s")
    try:
        if arguments.end_to_end is not None:
            end_to_end(arguments.end_to_end, device, bandwidth, repeats)
            return
        measure_visits(arguments, device, bandwidth)
    except UserError as error:
        parser.error(str(error))


def measure_visits(arguments: argparse.Namespace, device: torch.device, bandwidth: float) -> None:
    """Print the table of visits. Raises UserError for an unknown model, or a context too long for one."""
    lines = []
    wanted = visits(arguments)
    rates: dict[torch.dtype, float] = {}
    for name in arguments.models or ["llama-3-8b", "llama-3-70b"]:
        section = load_config([f"model={name}", "model.weights=dummy"]).model
        config = resolve(section).config
        longest = max(max(visit.context, visit.prefill) for visit in wanted)
        if longest > config.max_context:
            raise UserError(f"model={name} takes contexts of {config.max_context} tokens, not of {longest}")
        dtype = model_dtype(section, config)
        if dtype not in rates:
            rates[dtype] = matrix_rate(device, dtype, arguments.repeats)
            lasting = ""
            if device.type == "cuda":
                lasting = f", {lasting_matrix_rate(device, dtype) / 1e12:.1f} of products without a pause"
            print(f"Matrix rate ({str(dtype).removeprefix('torch.')}): {rates[dtype] / 1e12:.3f} TFLOP/s{lasting}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        layers = min(arguments.layers, config.num_layers)
        stack = Stack(config, layers, dtype, device, wanted)
        peak = Peak(bandwidth, rates[dtype])
        lines += [[f"{name}, {layers} layers", *stack.line(visit, peak, arguments.repeats)] for visit in wanted]
        del stack
    table("Visits of a stage: us per layer; the last two: ms per visit", HEADER, lines)


if __name__ == "__main__":
    main()
