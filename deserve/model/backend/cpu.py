"""`cpu.c`, compiled for one model on the machine that runs it.

The compiler is C's and needs no headers of torch, so this takes half a second, once; OpenMP is the one that torch has
loaded, so both share their threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from deserve.batch import IntArray, Ints
from deserve.kvcache.pages import KVLayer
from deserve.model.cache import cache_folder
from deserve.model.config import ModelConfig

SOURCE = Path(__file__).with_name("cpu.c")
LINES = 192  # queries of a block that read one KV head: they, their scores and results should stay in the cache
GRAIN = 32768  # elements that are worth a thread, as in PyTorch
LANES = 16  # floats that the kernel adds up at once
# Sums may be taken in any order; NaN and infinity keep their meaning.
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)


@dataclass(frozen=True)
class Reads:
    """Tokens that attend to pages in place.

    `tokens` [n] of the visit, int64; each attends to `lengths` [n] tokens, int32. `tables`, by page table, int32:
    [n, width] the pages of each token; or, with `blocks` [m, 3], int64, of many tokens: row blocks[i, 0] is read by
    those from blocks[i, 1] to blocks[i, 2], whose lengths grow.
    """

    tokens: Ints
    lengths: IntArray
    tables: list[IntArray]
    blocks: Ints | None = None


class CpuKernels:
    """The functions of `cpu.c` for one model and dtype. `block`: tokens that a block of `Reads` may have."""

    def __init__(self, library: ctypes.CDLL, block: int):
        self.block = block
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._attend, self._rms_norm, self._silu_and_mul = library.attend, library.rms_norm, library.silu_and_mul
        self._attend_blocks = library.attend_blocks
        self._attend.argtypes = [pointer, count, pointer, count, *[pointer] * 2, count, *[pointer] * 3, number]
        self._attend_blocks.argtypes = [pointer, count, pointer, count, pointer, count, *[pointer] * 5, number]
        self._rms_norm.argtypes = [*[pointer] * 4, count, count, ctypes.c_float, number]
        self._silu_and_mul.argtypes = [pointer, pointer, count, count, number]
        self._rotate = library.rotate
        self._rotate.argtypes = [pointer, count, *[pointer] * 3, *[count] * 3, number]
        self._rms_norm.restype = self._silu_and_mul.restype = self._rotate.restype = None

    def attend(
        self, layer: KVLayer, reads: Reads, q: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor | None
    ) -> None:
        """Attend with q [T, heads, head_dim] as `reads` says, into the tokens' places of `out` [T, heads * head_dim].

        `log_sums` [T, heads], float32, takes the log-sum-exp of their scores. All are contiguous. Raises MemoryError.
        """
        elements = int(reads.lengths.sum()) * layer.memory[0, 0, 0].numel()
        table, blocks = reads.tables[layer.table], reads.blocks
        pages = layer.memory.data_ptr(), layer.memory.shape[2], table.ctypes.data, table.shape[1]
        places = out.data_ptr(), None if log_sums is None else log_sums.data_ptr(), _threads(elements)
        lengths, tokens, queries = reads.lengths.ctypes.data, reads.tokens.ctypes.data, q.data_ptr()
        if blocks is None:
            failed = self._attend(*pages, lengths, tokens, len(reads.tokens), queries, *places)
        else:
            failed = self._attend_blocks(*pages, blocks.ctypes.data, len(blocks), lengths, tokens, queries, *places)
        if failed:
            raise MemoryError("out of memory for the scores of attention")

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """RMSNorm of x [..., n], or of its sum with the contiguous `residual`, which becomes that sum."""
        x, n = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        residual_at = None if residual is None else residual.data_ptr()
        sizes = (x.numel() // n, n, eps, _threads(x.numel()))
        self._rms_norm(x.data_ptr(), residual_at, weight.data_ptr(), out.data_ptr(), *sizes)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [m, 2 * n]: [m, n]."""
        gate_up, n = gate_up.contiguous(), gate_up.shape[-1] // 2
        out = gate_up.new_empty(len(gate_up), n)
        self._silu_and_mul(gate_up.data_ptr(), out.data_ptr(), len(gate_up), n, _threads(out.numel()))
        return out

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, head_dim], of which only tokens may lie apart, turned by cos and sin [T, ..., dim]."""
        tokens, heads, _ = x.shape
        out = torch.empty(x.shape, dtype=x.dtype)
        sizes = (tokens, heads, cos.shape[-1], _threads(x.numel()))
        self._rotate(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *sizes)
        return out


def _threads(elements: int) -> int:
    """Threads for a call that works on so many elements: to wake one costs more than to do a little work oneself."""
    return min(torch.get_num_threads(), 1 + elements // GRAIN)


def cpu_kernels(config: ModelConfig, dtype: torch.dtype) -> CpuKernels | None:
    """The kernels for a model; None where there are none: without a C compiler, for another dtype or head size."""
    if dtype not in (torch.bfloat16, torch.float32) or config.head_dim % LANES:
        return None
    shape = {"HEADS": config.num_heads, "KV_HEADS": config.num_kv_heads, "HEAD_DIM": config.head_dim}
    block = shape["BLOCK"] = max(1, LINES // config.group)
    library = _library(tuple(f"-D{name}={value}" for name, value in shape.items()), dtype == torch.bfloat16)
    return CpuKernels(library, block) if library is not None else None


@cache
def _library(shape: tuple[str, ...], bfloat16: bool) -> ctypes.CDLL | None:
    command = os.environ.get("CC", "cc")
    compiler = shutil.which(command)
    if compiler is None:
        _regret(f"there is no {command}")
        return None
    options = (*FLAGS, *shape, *(("-DBFLOAT16",) if bfloat16 else ()))
    made_of = (SOURCE.read_text(), compiler, platform.machine(), _processor(), *options)
    name = f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        if not (folder / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="kernels.tmp-", dir=folder) as scratch:
                compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / name
                # Linked without OpenMP's library: the functions are found in the one that is there.
                for step in ((*options, "-c", SOURCE, "-o", compiled), ("-shared", compiled, "-o", linked, "-lm")):
                    subprocess.run([compiler, *map(str, step)], check=True, capture_output=True)
                os.replace(linked, folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        _regret(f"{command} cannot compile it: {error}")
        return None


def _regret(reason: str) -> None:
    print(f"The kernels for CPUs are not usable ({reason}): PyTorch's take their place, more slowly", flush=True)


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU ")))
