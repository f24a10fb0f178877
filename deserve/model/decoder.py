"""A shard of a dense decoder (Llama and its relatives): the layers of one stage as a function."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from deserve.kvcache.pages import KVLayer, KVPages
from deserve.model.backend.base import Backend
from deserve.model.config import ModelConfig
from deserve.model.weights import ShardWeights

Step = Callable[[], object]


class Attend:
    """A layer's attention over the rows of a visit. Called, it leaves its results in `output` [T, q_size]."""

    output: torch.Tensor

    def __init__(self, backend: Backend, layer: KVLayer, q: torch.Tensor, kind: int, sinks: torch.Tensor | None):
        self._backend, self._layer, self._q, self._how = backend, layer, q, (kind, sinks)

    def __call__(self) -> None:
        self.output = self._backend.attend(self._layer, self._q, *self._how)


class Decoder:
    """Some of a model's layers, with the embedding if it is the first shard and the output layer if the last.

    T stands for the tokens of a visit, laid end to end; which sequence each belongs to is the backend's affair.
    """

    def __init__(self, config: ModelConfig, weights: ShardWeights, backend: Backend):
        self.config = config
        self.weights = weights
        self.backend = backend
        # As transformers does, in the dtype of the embedding.
        embedding = weights.embedding
        self._scale = 1.0 if embedding is None else float(torch.tensor(config.embedding_scale, dtype=embedding.dtype))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [T] to hidden states [T, hidden]."""
        assert self.weights.embedding is not None
        embedded = F.embedding(tokens, self.weights.embedding)
        return embedded if self._scale == 1 else embedded.mul_(self._scale)

    def forward(self, x: torch.Tensor, kv: KVPages) -> torch.Tensor:
        """Hidden states x [T, hidden] through the shard's layers, in x's memory."""
        for step in self.steps(x, kv):
            step()
        return x

    def steps(self, x: torch.Tensor, kv: KVPages, qkv: torch.Tensor | None = None) -> Iterator[Step]:
        """The same, stopping wherever a CUDA graph may have to end: whoever iterates calls each step that it is given.

        Those are the layers' attentions, and `kv.follow`. Queries, keys and values are computed in `qkv`
        [T, q_size + 2 * kv_size], if it is given, so that each attention finds its queries in the same place.
        """
        backend = self.backend
        branch: torch.Tensor | None = None  # what is yet to be added to x
        for index, layer in enumerate(self.weights.layers):
            if branch is None:
                h = backend.rms_norm(x, layer.input_norm)
            else:
                h = backend.add_rms_norm(branch, x, layer.input_norm)
            q, k, v = layer.attention.heads(h, self.config, backend, qkv)
            with kv.layer(index, len(x)) as pages:
                kind = layer.attention.kind
                backend.append(pages, k, v, kind)
                attend = Attend(backend, pages, q, kind, layer.attention.sinks)
                yield attend
            h = layer.attention.output(attend.output)
            if layer.attention_norm is not None:
                h = backend.rms_norm(h, layer.attention_norm)
            h = backend.add_rms_norm(h, x, layer.post_norm)
            branch = layer.mlp(h, backend)
            if layer.mlp_norm is not None:
                branch = backend.rms_norm(branch, layer.mlp_norm)
            if index + 1 == kv.turn:
                yield partial(kv.follow, range(kv.turn))
        if branch is not None:
            x.add_(branch)
        kv.join()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states x [n, hidden] after the last layer to logits [n, vocab]."""
        assert self.weights.final_norm is not None and self.weights.head is not None
        logits = self.weights.head(self.backend.rms_norm(x, self.weights.final_norm))
        cap = self.config.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
