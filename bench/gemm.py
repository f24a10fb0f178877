"""Times of a product with quantised weights: unpacked before, and by humming's fused kernels.

    python -m bench.gemm [--shapes 28672x4096 ...] [--forms int4 ...] [--tokens 1 16 ...]    (prints Markdown tables)

Shapes are outputs x inputs. Device times are medians of CUDA graph replays, through as many copies of the weights as
the L2 cache does not hold. Floor: the bytes of weights and activations at the bandwidth of a large copy, or the
operations at the rate of a large product in bfloat16, whichever takes longer. scaled_mm: torch._scaled_mm, which
multiplies activations in fp8 too, their rounding included.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.timing import copy_bandwidth, graph_ms, matrix_rate, table
from deserve.model.humming import HummingLinear
from deserve.model.linear import Linear
from deserve.model.packed import LARGEST, Form, PackedLinear

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
COLD_BYTES = 256 << 20  # five times the L2 cache of an H100
REPEATS = 7
SHAPES = ["4096x4096", "28672x4096", "10240x8192", "57344x8192"]  # output, gate and up of Llama-3-8B; qkv, ... of 70B
TOKENS = [1, 16, 64, 128, 256, 512, 1024, 4096]
FORMS = {
    "int4": Form("int4", columns=128),  # GPTQ and W4A16, symmetric
    "int4-zeros": Form("int4", columns=128, zeros=True),  # AWQ
    "int8": Form("int8"),
    "fp8": Form("fp8"),
    "fp8-blocks": Form("fp8", 128, 128),
    "fp4": Form("fp4", columns=32),  # MXFP4
}


Product = Callable[[Tensor], Tensor]


def times_us(make: Callable[[], Product], nbytes: int, xs: list[Tensor]) -> list[float]:
    """Microseconds of a product with each of `xs`; the weights of one that `make` makes take `nbytes`."""
    copies = [make() for _ in range(-(-COLD_BYTES // nbytes))]

    def us(x: Tensor) -> float:
        return 1e3 * graph_ms(lambda: [product(x) for product in copies], DEVICE, REPEATS) / len(copies)

    return list(map(us, xs))


def dense(weight: Tensor) -> Product:
    return Linear(weight.clone())


def scaled_mm(weight: Tensor) -> Product:
    """The product with fp8 weights, one scale per output, of activations rounded to fp8 by token."""
    packed = FORMS["fp8"].quantise(weight)
    codes, scale = packed.codes.t(), packed.scale.t().contiguous()

    def product(x: Tensor) -> Tensor:
        by_token = x.abs().amax(1, keepdim=True).float().div_(LARGEST["fp8"])
        return torch._scaled_mm((x / by_token).to(FP8), codes, by_token, scale, out_dtype=BF16)

    return product


def quantised(name: str, weight: Tensor) -> PackedLinear:
    """With random zero points, where there are any."""
    packed = FORMS[name].quantise(weight)
    if packed.zero is not None:
        packed.zero.random_(0, 16)
    return PackedLinear([packed])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    args = parser.parse_args()
    bandwidth, rate = copy_bandwidth(DEVICE), matrix_rate(DEVICE, BF16)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} T/s"
    )
    summary = []
    for shape in args.shapes:
        size, inputs = map(int, shape.split("x"))
        weight = torch.randn(size, inputs, dtype=BF16, device=DEVICE) / inputs**0.5
        xs = [torch.randn(tokens, inputs, dtype=BF16, device=DEVICE) for tokens in args.tokens]
        plain = times_us(partial(dense, weight), weight.nbytes, xs)
        eight = times_us(partial(scaled_mm, weight), weight.nbytes // 2, xs)
        lines = []
        for name in args.forms:
            linear, nbytes = quantised(name, weight), FORMS[name].bytes(size, inputs)
            unpacked = times_us(partial(PackedLinear, linear.parts), nbytes, xs)
            begin = time.monotonic()
            HummingLinear(linear, BF16)
            print(f"{shape}, {name}: kernels compiled in {time.monotonic() - begin:.1f} s", flush=True)
            fused = times_us(partial(HummingLinear, linear, BF16), nbytes, xs)
            for x, *times in zip(xs, plain, unpacked, fused, eight, strict=True):
                moved, operations = nbytes + 2 * len(x) * (size + inputs), 2 * len(x) * size * inputs
                floor = 1e6 * max(moved / bandwidth, operations / rate)
                lines.append([name, len(x), *(f"{us:.0f}" for us in (*times, floor)), f"{times[0] / times[2]:.2f}"])
            summary.append([shape, name, *(f"{a / b:.2f}" for a, b in zip(plain, fused, strict=True))])
        columns = ["form", "tokens", "bf16", "unpacked", "humming", "scaled_mm", "floor", "bf16 / humming"]
        table(f"{shape} (us)", columns, lines)
    table("bf16 / humming, by tokens", ["shape", "form", *map(str, args.tokens)], summary)


if __name__ == "__main__":
    main()
