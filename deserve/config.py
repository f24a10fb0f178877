"""The typed schema of `conf/`, and the composition of a run's configuration from overrides."""

import difflib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deserve.errors import UserError, as_json
from deserve.model.config import parse_config
from deserve.model.schemes.rounded import FORMS

POLICIES = ("vanilla", "prefill_first", "decode_first")
MOST = 2**63 - 1  # what an int64 holds
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelSection:
    """Which model to run. A `path` on the command line replaces all that the group's entry says (`_own_model`)."""

    name: str = "???"
    path: str | None = None  # Hugging Face folder or hub id; null: the model the group stands for
    weights: str = "auto"  # auto: the checkpoint's; dummy: random, made on the device
    dtype: str = "auto"  # auto: the checkpoint's
    architecture: dict[str, Any] | None = None  # config.json of a model without a folder
    quantise: str | None = None  # fp8, int4: round the layers' weights while loading
    packed: bool = False  # whether quantised weights stay packed in memory
    gemm: str = "torch"  # products with packed weights: humming: by fused kernels; torch: unpacked before; auto


@dataclass
class PipelineSection:
    """How the layers are cut, and how many micro-batches circulate."""

    replicas: Any = 1  # rings that the ranks form, each with the whole model; auto: as many as are fastest
    rounds: Any = "auto"  # micro-batches in flight
    partition: Any = "auto"  # or a list of first layers, one per rank: [emb, 20, 40, 60]
    micro_batch_size: Any = "auto"  # sequences in one micro-batch
    policy: str = "auto"
    max_batch_tokens: Any = "auto"  # token budget of one visit
    tune: bool = True  # what is auto and rank 0's alone, by the throughput of a long job


@dataclass
class KVCacheSection:
    """Where keys and values lie."""

    dtype: str = "auto"  # auto: the model's; fp8: pages in e4m3
    page_size: int = 16  # tokens
    main_pages: Any = "auto"
    swap_pages: Any = "auto"  # per micro-batch; 0: no swapping
    buddy_height: int = 16  # the host pool holds 2^(height-1) pages
    gpu_memory_gb: float | None = None  # cap on the KV memory of one GPU
    share_prefixes: bool = True  # what prompts have in common is computed and kept once

    @property
    def fp8(self) -> bool:
        return self.dtype == "fp8"


@dataclass
class NetworkSection:
    """The network to simulate between neighbouring ranks."""

    latency_ms: float = 0.0  # one way
    bandwidth_mbps: float | None = None  # per direction; null: unlimited


@dataclass
class CommSection:
    """How ranks reach each other."""

    activations: str = "auto"  # auto: hidden states as they are; fp8: coded between hosts
    backend: str = "auto"  # nccl between GPUs of a host, gloo between hosts; or one of them for all
    timeout_s: float = 60.0  # a rank silent for longer is given up


@dataclass
class WorkloadSection:
    """Which requests to answer."""

    source: str = "fixed512:256:0"
    path: str | None = None
    limit: int | None = None
    concurrency: Any = "auto"  # requests in the pipeline at once
    unknown_keys: str = "refuse"  # requests with keys that are not supported; ignore: answer them without
    model_names: Any = "auto"  # what requests may call the model: its own names; more names; or any
    order: str = "auto"  # auto: requests that begin alike are admitted together; file: as they come
    shared_tokens: int = 0  # first tokens that all prompts of a fixed workload have in common
    max_line_mb: float = 32.0  # of a .jsonl file, or a record of a data set
    chat_template: str | None = None  # a Jinja file in place of the model's own
    reasoning: str = "auto"  # thoughts of chats: keep them in the text; split: as reasoning_content; auto: by template


@dataclass
class SamplingSection:
    """Defaults for what a request does not say itself."""

    max_tokens: int | None = 256  # null: to the end of the context
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: Any = None  # a string or a list of strings
    ignore_eos: bool = False


@dataclass
class SpeculationSection:
    """Tokens that are guessed, and verified by the visit that samples the next one. They change no answer."""

    tokens: Any = "auto"  # of a sequence and visit: auto, as many as are worth it; at most so many; 0: none
    model: str | None = None  # the folder of a small model of the same vocabulary, which guesses on rank 0


@dataclass
class OutputSection:
    """Where results go."""

    dir: str = "outputs"
    resume: bool = True
    errors: str = "same"  # the file that errors go to: results.jsonl; separate: errors.jsonl
    retry_errors: str = "auto"  # auto: those that another plan, setting or model folder may mend; all; none
    grace_s: float = 20.0  # time for visits in flight after SIGTERM
    checkpoint_s: float = 10.0  # between two copies of the answers in flight, in unfinished.jsonl, at most


@dataclass
class ReportSection:
    """How a run can be watched."""

    metrics_port: int | None = None  # of rank 0, for Prometheus; null or 0: none
    metrics_host: str = "127.0.0.1"  # the address that it is opened on


@dataclass
class ElasticSection:
    """Jobs that go on with fewer hosts (`torchrun --nnodes=MIN:MAX`)."""

    wait_s: float = 600.0  # for a host to come back, where the others cannot hold the model


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
    speculation: SpeculationSection = field(default_factory=SpeculationSection)
    output: OutputSection = field(default_factory=OutputSection)
    report: ReportSection = field(default_factory=ReportSection)
    elastic: ElasticSection = field(default_factory=ElasticSection)
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
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: model=5, or an empty key
        raise UserError(_one_line(error, overrides)) from error
    return checked(composed, schema, overrides)


def checked(composed: DictConfig, schema: type[C], overrides: list[str]) -> C:
    """What Hydra composed from `overrides`, as `schema`. Raises UserError as `compose_config` does."""
    try:
        _check_kinds(composed, schema)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except OmegaConfBaseException as error:
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
    """What Hydra or OmegaConf say, in the words of this program; without its advice for Hydra's own developers."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} is not key=value, such as workload.source=prompts.jsonl or sampling.stop=[a,b]; a value "
            "with special characters goes into quotes within quotes: 'workload.source=\"a=b.jsonl\"'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).partition("/")
        own = "; a folder or hub id of yours goes into model.path" if group == "model" else ""
        return f"{group}={name} is not one of {', '.join(error.options)}{own}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{error}".strip() or f"{cause}"
    if match := re.match(r"Could not override '(.*)'", text):
        return f"{match[1]} is not a key{_meant(match[1])}: python -m deserve.run --config prints all keys"
    if match := re.match(r"Ambiguous value for argument '((.*?)=(.*))'\n", text):
        _, key, value = match.groups()
        return f"{match[1]} has a comma: write a list as {key}=[{value}], and a text as '{key}=\"{value}\"'"
    if match := re.match(
        r"Value '(.*)' of type '\w+' could not be converted to (Float|Integer)\s+full_key: (\S+)", text
    ):
        return f"{match[3]}={match[1]} must be a {'whole ' * (match[2] == 'Integer')}number"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("To append", "reference_type", "object_type"))]
    return " ".join(kept) + f" (overrides: {' '.join(overrides) or 'none'})"


def _meant(key: str) -> str:
    """The key that was probably meant by `key`, for a message."""
    keys: list[str] = []
    for section in fields(Config):
        made: Any = section.default_factory
        keys += [f"{section.name}.{entry.name}" for entry in fields(made)] if is_dataclass(made) else [section.name]
    near = [other for other in keys if other.rpartition(".")[2] == key]
    near = near or difflib.get_close_matches(key, [*keys, *(field.name for field in fields(Config))], n=1)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _check_kinds(section: DictConfig, schema: Any, prefix: str = "") -> None:
    """Raises UserError for what OmegaConf would convert in silence or refuse without naming the key."""
    kinds = {entry.name: entry.type for entry in fields(schema)} if is_dataclass(schema) else {}
    for name in map(str, section):
        key, kind, value = f"{prefix}{name}", kinds.get(name, Any), section[name]
        if is_dataclass(kind) and not isinstance(value, DictConfig):
            raise UserError(f"{key}={value} must be a section: set {key}.{fields(kind)[0].name} and the like")
        if key == "model.architecture" and not (value is None or isinstance(value, DictConfig)):
            raise UserError(f"{key}={value} must hold the keys of a config.json")
        if kind is bool and not isinstance(value, bool):
            raise UserError(f"{key}={value} must be true or false")
        if isinstance(value, int) and abs(value) > MOST:
            raise UserError(f"{key}={value} is out of range: at most {MOST} is possible")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be a finite number")
        if isinstance(value, DictConfig):
            _check_kinds(value, kind, f"{key}.")


def _auto_or_int(key: str, value: Any, minimum: int) -> None:
    if value == "auto":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{key}={value} must be auto or a whole number of at least {minimum}")


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} must be one of {', '.join(choices)}")


def in_range(key: str, value: float | None, minimum: float, maximum: float = math.inf, exclusive: bool = False) -> None:
    """Raises UserError unless `value` is None or a number from `minimum`, itself `exclusive`, to `maximum`."""
    if value is None:
        return
    above = value > minimum if exclusive else value >= minimum
    if not (above and value <= maximum):
        bounds = f"{'more than' if exclusive else 'at least'} {minimum:g}"
        bounds += f" and at most {maximum:g}" if math.isfinite(maximum) else ""
        raise UserError(f"{key}={value} must be a number of {bounds}")


def _check(config: Config) -> None:
    _one_of("pipeline.policy", config.pipeline.policy, ("auto", *POLICIES))
    _one_of("model.weights", config.model.weights, ("auto", "dummy"))
    _one_of("model.dtype", config.model.dtype, DTYPES)
    if config.model.quantise is not None:
        _one_of("model.quantise", config.model.quantise, tuple(FORMS))
    _one_of("model.gemm", config.model.gemm, ("auto", "torch", "humming"))
    _one_of("kvcache.dtype", config.kvcache.dtype, ("auto", "fp8"))
    _one_of("comm.activations", config.comm.activations, ("auto", "fp8"))
    _one_of("comm.backend", config.comm.backend, ("auto", "nccl", "gloo"))
    _one_of("workload.unknown_keys", config.workload.unknown_keys, ("refuse", "ignore"))
    _one_of("workload.reasoning", config.workload.reasoning, ("auto", "keep", "split"))
    _one_of("output.errors", config.output.errors, ("same", "separate"))
    _one_of("workload.order", config.workload.order, ("auto", "file"))
    in_range("workload.shared_tokens", config.workload.shared_tokens, 0)
    if config.workload.shared_tokens and not config.workload.source.startswith("fixed"):
        raise UserError("workload.shared_tokens is for workload.source=fixedCOUNT:LENGTH:VARIATION")
    _one_of("output.retry_errors", config.output.retry_errors, ("auto", "all", "none"))
    _one_of("device", config.device, ("auto", "cpu", "cuda"))
    _auto_or_int("pipeline.replicas", config.pipeline.replicas, 1)
    _auto_or_int("pipeline.rounds", config.pipeline.rounds, 1)
    _auto_or_int("pipeline.micro_batch_size", config.pipeline.micro_batch_size, 1)
    _auto_or_int("kvcache.main_pages", config.kvcache.main_pages, 1)
    _auto_or_int("kvcache.swap_pages", config.kvcache.swap_pages, 0)
    _auto_or_int("speculation.tokens", config.speculation.tokens, 0)
    if config.speculation.model is not None and config.speculation.tokens == 0:
        raise UserError("speculation.model makes draft tokens, and speculation.tokens=0 wants none: leave one out")
    _auto_or_int("workload.concurrency", config.workload.concurrency, 1)
    _auto_or_int("pipeline.max_batch_tokens", config.pipeline.max_batch_tokens, 1)
    in_range("kvcache.page_size", config.kvcache.page_size, 1)
    in_range("kvcache.buddy_height", config.kvcache.buddy_height, 0)
    in_range("kvcache.gpu_memory_gb", config.kvcache.gpu_memory_gb, 0, exclusive=True)
    in_range("network.latency_ms", config.network.latency_ms, 0)
    in_range("network.bandwidth_mbps", config.network.bandwidth_mbps, 0, exclusive=True)
    in_range("comm.timeout_s", config.comm.timeout_s, 0, exclusive=True)
    in_range("workload.limit", config.workload.limit, 1)
    in_range("workload.max_line_mb", config.workload.max_line_mb, 0, exclusive=True)
    names = config.workload.model_names
    if names not in ("auto", "any") and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"workload.model_names={names} must be auto, any, or a list of names such as [gpt-4o,gpt-5]")
    in_range("sampling.max_tokens", config.sampling.max_tokens, 1)
    in_range("sampling.temperature", config.sampling.temperature, 0)
    in_range("sampling.top_p", config.sampling.top_p, 0, 1, exclusive=True)
    in_range("sampling.top_k", config.sampling.top_k, -1)
    in_range("time_limit_s", config.time_limit_s, 0, exclusive=True)
    in_range("warmup_s", config.warmup_s, 0)
    in_range("output.grace_s", config.output.grace_s, 0)
    in_range("report.metrics_port", config.report.metrics_port, 0, 65535)
    in_range("elastic.wait_s", config.elastic.wait_s, 0)
    in_range("output.checkpoint_s", config.output.checkpoint_s, 0, exclusive=True)
    partition = config.pipeline.partition
    if partition != "auto" and not (
        isinstance(partition, list) and all(first == "emb" or type(first) is int for first in partition)
    ):
        raise UserError(f"pipeline.partition={partition} must be auto or a list of first layers such as [emb,20,40,60]")
    stop = config.sampling.stop
    texts = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"sampling.stop={as_json(stop)} must be a string or a list of strings, none of them empty")
    for key, text in {
        "model.path": config.model.path,
        "speculation.model": config.speculation.model,
        "output.dir": config.output.dir,
        "report.metrics_host": config.report.metrics_host,
    }.items():
        if text == "":
            raise UserError(f"{key} is empty: give {'an address' if 'host' in key else 'a path'}, or leave it out")
    architecture = config.model.architecture
    if architecture is not None:
        source = "model.architecture"
        parse_config(architecture, source)
        eos = architecture.get("eos_token_id")
        if not (eos is None or all(type(token) is int for token in (eos if isinstance(eos, list) else [eos]))):
            raise UserError(f"{source}: eos_token_id must be a token id or a list of them, not {as_json(eos)}")
