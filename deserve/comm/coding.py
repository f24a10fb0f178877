"""Hidden states in a byte an element, for links between hosts: e4m3 codes and one scale per token.

Each token is coded by itself, so what it becomes does not depend on what else is in the frame.
"""

import torch

from deserve.comm.link import Receiver, Sender
from deserve.staging import to_device

CODE, SCALE = torch.float8_e4m3fn, torch.float32
LARGEST = torch.finfo(CODE).max
SMALLEST_SCALE = torch.finfo(SCALE).tiny  # keeps a token of zeros from being divided by zero


def coded_bytes(hidden: int) -> int:
    """Bytes of one token's coded hidden state."""
    return hidden * CODE.itemsize + SCALE.itemsize


def encode(x: torch.Tensor) -> torch.Tensor:
    """Code hidden states x [T, hidden] as uint8 [T * coded_bytes(hidden)]: all scales, then all codes.

    The largest element of a token becomes the largest code. If one is infinite or NaN, all of the token decode to NaN.
    """
    values = x.to(SCALE)
    scale = (values.abs().amax(1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    codes = (values / scale).to(CODE)
    return torch.cat([part.view(-1).view(torch.uint8) for part in (scale, codes)])


def decode(payload: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """The hidden states [T, hidden] that were coded as `payload`, in memory of their own."""
    tokens = len(payload) // coded_bytes(hidden)
    scales, codes = payload.split([tokens * SCALE.itemsize, tokens * hidden * CODE.itemsize])
    return (codes.view(CODE).view(tokens, hidden).to(SCALE) * scales.view(SCALE).unsqueeze(1)).to(dtype)


class CodingSender(Sender):
    """Codes hidden states on the device where they lie, and passes them on to `sender`."""

    def __init__(self, sender: Sender):
        self._sender = sender

    def send(self, payload: torch.Tensor) -> None:
        self._sender.send(encode(payload) if len(payload) else payload)

    def close(self) -> None:
        self._sender.close()


class DecodingReceiver(Receiver):
    """Decodes what `receiver` gets on `device`: its payloads are hidden states of `dtype` there."""

    def __init__(self, receiver: Receiver, hidden: int, dtype: torch.dtype, device: torch.device):
        self._receiver, self._hidden, self._dtype, self._device = receiver, hidden, dtype, device

    def expect(self) -> None:
        self._receiver.expect()

    def receive(self) -> torch.Tensor:
        coded = to_device(self._receiver.receive(), self._device)
        self.held_s = self._receiver.held_s
        return decode(coded, self._hidden, self._dtype).view(-1).view(torch.uint8)

    def close(self) -> None:
        self._receiver.close()
