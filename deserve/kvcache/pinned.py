"""Host memory that a GPU reaches: page-locked, so that copies need not wait for the host."""

import weakref

import torch


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A host tensor of zeros, page-locked if `device` is a GPU.

    Unlike PyTorch's own page-locked memory it takes no more than its size, which is not rounded up to a power of two.
    On a CPU, memory that is never touched costs nothing. Raises MemoryError where the host has too little.
    """
    if device.type != "cuda" or 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise MemoryError(str(error)) from error
    tensor.view(torch.uint8).zero_()  # by all threads: locking would touch the pages one by one
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status):
        raise MemoryError(f"cannot lock {tensor.nbytes / 1e9:.1f} GB of host memory for swapped KV pages: {status}")
    weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor
