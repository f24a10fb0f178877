"""How much memory a stage's KV pages take."""


def slab_slots(layers: int, rounds: int = 2) -> int:
    """Of how many of a stage's layers the swap slab has room for the pages: half of them.

    Of all for a single round, whose pages never leave. And not of one of two: a CUDA graph both gives up a layer's
    pages and awaits the next layer's, and what takes the place of the former comes in after its launch.
    """
    return layers if rounds == 1 else max(min(2, layers), -(-layers // 2))
