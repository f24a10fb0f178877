"""The typed schema of `conf/`, and the composition of a run's configuration from overrides."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deserve.errors import UserError

POLICIES = ("vanilla", "prefill_first", "decode_first")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelSection:
    """Which model to run. A `path` on the command line replaces all that the group's entry says (`_own_model`)."""

    name: str = "???"
    path: str | None = None  # Hugging Face folder or hub id; null: the model the group stands for
    weights: str = "auto"  # auto: the checkpoint's; dummy: random, made on the device
    dtype: str = "auto"  # auto: the checkpoint's
    architecture: dict[str, Any] | None = None  # config.json of a model without a folder


@dataclass
class PipelineSection:
    """How the layers are cut, and how many micro-batches circulate."""

    rounds: Any = "auto"  # micro-batches in flight
    partition: Any = "auto"  # or a list of first layers, one per rank: [emb, 20, 40, 60]
    micro_batch_size: Any = "auto"  # sequences in one micro-batch
    policy: str = "auto"
    max_batch_tokens: Any = "auto"  # token budget of one visit


@dataclass
class KVCacheSection:
    """Where keys and values lie."""

    page_size: int = 16  # tokens
    main_pages: Any = "auto"
    swap_pages: Any = "auto"  # per micro-batch; 0: no swapping
    buddy_height: int = 16  # the host pool holds 2^(height-1) pages
    gpu_memory_gb: float | None = None  # cap on the KV memory of one GPU


@dataclass
class NetworkSection:
    """The network to simulate between neighbouring ranks."""

    latency_ms: float = 0.0  # one way
    bandwidth_mbps: float | None = None  # per direction; null: unlimited


@dataclass
class CommSection:
    """How ranks reach each other."""

    backend: str = "auto"  # nccl between GPUs of a host, gloo between hosts; or one of them for all
    timeout_s: float = 60.0  # a rank silent for longer is given up


@dataclass
class WorkloadSection:
    """Which requests to answer."""

    source: str = "fixed512:256:0"
    path: str | None = None
    limit: int | None = None
    concurrency: Any = "auto"  # requests in the pipeline at once


@dataclass
class SamplingSection:
    """Defaults for what a request does not say itself."""

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: Any = None  # a string or a list of strings
    ignore_eos: bool = False


@dataclass
class OutputSection:
    """Where results go."""

    dir: str = "outputs"
    resume: bool = True
    grace_s: float = 20.0  # time for visits in flight after SIGTERM


@dataclass
class Config:
    """The whole configuration of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    pipeline: PipelineSection = field(default_factory=PipelineSection)
    kvcache: KVCacheSection = field(default_factory=KVCacheSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    comm: CommSection = field(default_factory=CommSection)
    workload: WorkloadSection = field(default_factory=WorkloadSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    output: OutputSection = field(default_factory=OutputSection)
    device: str = "auto"
    trace: bool = False
    time_limit_s: float | None = None
    warmup_s: float = 0.0


C = TypeVar("C", bound=Config)


def config_dir() -> Path:
    """The folder of YAML files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def load_config(overrides: list[str]) -> Config:
    """Compose a run's configuration; see `compose_config`."""
    return compose_config(overrides, "config", Config)


def compose_config(overrides: list[str], name: str, schema: type[C]) -> C:
    """Compose `conf/<name>.yaml` with Hydra `overrides` and check every key against `schema`.

    Raises UserError, naming the key, for an unknown key or an ill-typed or impossible value.
    """
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            composed = compose(name, overrides=overrides)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, overrides)) from error
    assert isinstance(config, schema)
    if config.model.path:
        _own_model(config.model, config.model.path, {override.lstrip("+").partition("=")[0] for override in overrides})
    _check(config)
    return config


def _own_model(model: ModelSection, path: str, stated: set[str]) -> None:
    """Where the user states `model.path`, what he does not state follows from it, not from the group's entry.

    The entry is about another model: with `model=tiny` a folder would get random weights, with any entry its name.
    """
    if "model.path" not in stated:
        return
    folder = Path(path).expanduser()
    own = ModelSection(name=folder.resolve().name if folder.is_dir() else path)
    for key in ("name", "weights", "dtype", "architecture"):
        if not any(other == f"model.{key}" or other.startswith(f"model.{key}.") for other in stated):
            setattr(model, key, getattr(own, key))


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers, as `metrics.json` carries it."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _one_line(error: Exception, overrides: list[str]) -> str:
    """Hydra's message without its advice for Hydra's own developers."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{error}".strip() or f"{cause}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("To append", "reference_type", "object_type"))]
    return " ".join(kept) + f" (overrides: {' '.join(overrides) or 'none'})"


def _auto_or_int(key: str, value: Any, minimum: int) -> None:
    if value == "auto":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{key}={value} must be auto or a whole number of at least {minimum}")


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} must be one of {', '.join(choices)}")


def _at_least(key: str, value: float | None, minimum: float, exclusive: bool = False) -> None:
    if value is None:
        return
    if not (value > minimum if exclusive else value >= minimum):
        raise UserError(f"{key}={value} must be {'more than' if exclusive else 'at least'} {minimum:g}")


def _check(config: Config) -> None:
    _one_of("pipeline.policy", config.pipeline.policy, ("auto", *POLICIES))
    _one_of("model.weights", config.model.weights, ("auto", "dummy"))
    _one_of("model.dtype", config.model.dtype, DTYPES)
    _one_of("comm.backend", config.comm.backend, ("auto", "nccl", "gloo"))
    _one_of("device", config.device, ("auto", "cpu", "cuda"))
    _auto_or_int("pipeline.rounds", config.pipeline.rounds, 1)
    _auto_or_int("pipeline.micro_batch_size", config.pipeline.micro_batch_size, 1)
    _auto_or_int("kvcache.main_pages", config.kvcache.main_pages, 1)
    _auto_or_int("kvcache.swap_pages", config.kvcache.swap_pages, 0)
    _auto_or_int("workload.concurrency", config.workload.concurrency, 1)
    _auto_or_int("pipeline.max_batch_tokens", config.pipeline.max_batch_tokens, 1)
    _at_least("kvcache.page_size", config.kvcache.page_size, 1)
    _at_least("kvcache.buddy_height", config.kvcache.buddy_height, 0)
    _at_least("kvcache.gpu_memory_gb", config.kvcache.gpu_memory_gb, 0, exclusive=True)
    _at_least("network.latency_ms", config.network.latency_ms, 0)
    _at_least("network.bandwidth_mbps", config.network.bandwidth_mbps, 0, exclusive=True)
    _at_least("comm.timeout_s", config.comm.timeout_s, 0, exclusive=True)
    _at_least("workload.limit", config.workload.limit, 1)
    _at_least("sampling.max_tokens", config.sampling.max_tokens, 1)
    _at_least("sampling.temperature", config.sampling.temperature, 0)
    _at_least("sampling.top_p", config.sampling.top_p, 0, exclusive=True)
    _at_least("sampling.top_k", config.sampling.top_k, 0)
    _at_least("time_limit_s", config.time_limit_s, 0, exclusive=True)
    _at_least("warmup_s", config.warmup_s, 0)
    _at_least("output.grace_s", config.output.grace_s, 0)
    stop = config.sampling.stop
    if not (stop is None or isinstance(stop, str) or all(isinstance(item, str) for item in stop)):
        raise UserError(f"sampling.stop={stop} must be a string or a list of strings")
    if config.model.path == "":
        raise UserError("model.path is empty: give a folder or a hub id, or leave it out")
    os.fspath(config.output.dir)
