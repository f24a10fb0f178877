"""Copies of scattered blocks of KV memory, between a GPU's memory and pinned host memory or within one of them."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings it along where it can be used: not on a CPU
    triton = None

WORDS = 1024  # int32 that a program copies at a time

if triton is not None:

    @triton.jit
    def _copy(target, source, to, of, words, target_layer, source_layer, BLOCK: tl.constexpr):
        index, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
        to_block = tl.load(to + index).to(tl.int64)
        of_block = tl.load(of + index).to(tl.int64)
        if to_block >= 0:
            target += layer * target_layer + to_block * words
            source += layer * source_layer + of_block * words
            for start in range(0, words, BLOCK):
                word = start + tl.arange(0, BLOCK)
                tl.store(target + word, tl.load(source + word, word < words), word < words)


def copy_blocks(target: torch.Tensor, source: torch.Tensor, to: torch.Tensor, of: torch.Tensor, nbytes: int) -> None:
    """Enqueue, in every layer, the copy of block `of[i]` of `source` to block `to[i]` of `target`.

    target, source: [layers, ...], any of them in pinned host memory, taken as layers of blocks of `nbytes`, a multiple
    of 4, that follow each other. to, of: [n] on the device; where `to` is negative nothing is copied. The kernel
    reaches host memory itself: scattered blocks of kilobytes are too small for a copy engine.
    """
    if not len(to):
        return
    layers = [tensor.stride(0) * tensor.element_size() // 4 for tensor in (target, source)]
    words = [tensor.view(torch.int32) for tensor in (target, source)]
    _copy[len(to), len(target)](*words, to, of, nbytes // 4, *layers, BLOCK=WORDS, num_warps=4)
