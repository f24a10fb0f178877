"""Which model a run stands for: a folder, a hub id, the demonstration model, or a shape filled at random."""

import hashlib
import json
import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deserve.errors import UserError, as_json
from deserve.layout import Shard
from deserve.model import smollm2
from deserve.model.config import DTYPES, ModelConfig, parse_config
from deserve.model.safetensors_folder import INDEX, SINGLE, SafetensorsFolder, is_lfs_pointer
from deserve.model.schemes.rounded import rounded
from deserve.model.weights import check_weights, stored_name, tensor_shapes

if TYPE_CHECKING:
    from deserve.config import ModelSection

# All of a hub repository that is small: configuration, index and tokenizer
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
# What turns text into tokens and back; `generation_config.json` counts by what was read of it
TOKENIZING_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
SAMPLING_KEYS = ("do_sample", "temperature", "top_p", "top_k")
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file of weights
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A model to run. `folder` is None for a shape without files, which has random weights and no tokenizer.

    `eos_ids` are those of generation_config.json and of config.json; the tokenizer may have another.

    `weights` is `auto` or `dummy`. `generation` holds the checkpoint's own sampling defaults (`do_sample`,
    `temperature`, `top_p`, `top_k`, where it states them). `hub_id` is set where `folder` is a hub snapshot,
    whose weights come later, by `fetch_shard_files`.
    """

    name: str
    folder: Path | None
    config: ModelConfig
    eos_ids: tuple[int, ...]
    generation: dict[str, Any] = field(default_factory=dict)
    weights: str = "auto"
    hub_id: str | None = None

    def fingerprint(self) -> str:
        """sha256 over what decides the output tokens; of weights, by index, size and samples."""
        digest = hashlib.sha256(f"{self.weights} {self.config} {self.eos_ids} {self.generation}".encode())
        if self.folder is None:
            return digest.hexdigest()
        for name in ("config.json", *TOKENIZING_FILES, INDEX):
            path = self.folder / name
            digest.update(path.read_bytes() if path.is_file() else b"none")
        if self.hub_id is not None:
            digest.update(self.folder.name.encode())  # the commit; which weight files lie here varies by rank
        elif self.weights == "auto":
            for path in sorted({self.folder / file for file in SafetensorsFolder(self.folder).weight_map.values()}):
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                _digest_samples(digest, path)
        return digest.hexdigest()


def resolve(model: "ModelSection") -> Checkpoint:
    """Find the model that the section names; `path` wins over `name`. May convert or download small files.

    Raises UserError for a path that is neither a folder nor a hub id, what the hub refuses, and an unusable config.json
    or architecture.
    """
    checkpoint = _find(model)
    return replace(checkpoint, config=_quantised(checkpoint.config, model))


def _quantised(config: ModelConfig, model: "ModelSection") -> ModelConfig:
    """`config` with its weights rounded while loading, if so asked, packed in memory or not, and how they multiply."""
    quantisation, quantise, packed = config.quantisation, model.quantise, model.packed
    if quantise is not None:
        if quantisation is not None:
            raise UserError(f"model.quantise={quantise}: the checkpoint is quantised already; leave it out")
        if config.experts is not None and config.experts.names.fused:
            raise UserError(f"model.quantise={quantise}: not done for experts that lie in one tensor; leave it out")
        quantisation = rounded(quantise)
    if packed and quantisation is not None and config.experts is not None:
        raise UserError("model.packed=true: experts cannot be multiplied while packed; leave it out")
    if model.gemm == "humming" and not packed:
        raise UserError("model.gemm=humming multiplies with packed weights: set model.packed=true")
    if quantisation is not None:
        quantisation = replace(quantisation, packed=packed, gemm=model.gemm)
    return replace(config, quantisation=quantisation)


def _find(model: "ModelSection") -> Checkpoint:
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            return _from_folder(model, folder.resolve())
        if folder.is_file():
            raise UserError(f"model.path={model.path} is a file: give the folder of config.json and *.safetensors")
        if not HUB_ID.fullmatch(model.path):
            raise UserError(f"model.path={model.path}: no such folder")
        if model.weights == "dummy" and model.architecture is not None:
            return _from_architecture(model, model.architecture)
        return _from_folder(model, _snapshot(model.path), hub_id=model.path)
    if model.weights == "dummy" and model.architecture is not None:
        return _from_architecture(model, model.architecture)
    if model.name == smollm2.NAME:
        return _from_folder(model, smollm2.ensure_smollm2())
    raise UserError(
        f"model={model.name} has no checkpoint: give model.path=DIR_OR_HUB_ID, or model.weights=dummy and "
        "model.architecture"
    )


def check_files(checkpoint: Checkpoint) -> None:
    """Check what can be checked without reading weights: their index, the headers of those that lie here, pointers.

    Of a hub snapshot, most weight files come only when the plan says which rank needs which; `load_shard` checks those.
    Raises UserError, naming the file and the tensor.
    """
    if checkpoint.folder is None:
        return
    for name in TOKENIZING_FILES:
        path = checkpoint.folder / name
        if path.is_file() and is_lfs_pointer(path):
            raise UserError(f"{path}: only a pointer to the tokenizer; `git lfs pull` fetches it")
    if checkpoint.weights == "dummy":
        return
    if checkpoint.hub_id is None or any((checkpoint.folder / name).is_file() for name in (INDEX, SINGLE)):
        check_weights(checkpoint.folder, checkpoint.config, fetched=checkpoint.hub_id is None)


def model_dtype(section: "ModelSection", config: ModelConfig, on_cpu: bool = False) -> torch.dtype:
    """The dtype to compute in: `model.dtype`, or for `auto` the checkpoint's.

    Where this machine's CPU is to compute and has no instructions for bfloat16, `auto` takes float32 instead, which
    holds the same weights and is faster there.
    """
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    return torch.float32 if on_cpu and config.dtype == torch.bfloat16 and not multiplies_bfloat16() else config.dtype


def computes_on_cpu(device: str) -> bool:
    """Whether `device` of the configuration means the CPU here."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16: AMX or AVX512-BF16, or ARM's."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fetch_shard_files(checkpoint: Checkpoint, shard: Shard) -> None:
    """Download the weight files that hold `shard`, and no others; nothing to do for a local or dummy model.

    Raises UserError when a file is neither in the cache nor to be had.
    """
    if checkpoint.hub_id is None or checkpoint.folder is None or checkpoint.weights == "dummy":
        return
    files = {SINGLE}
    if (checkpoint.folder / INDEX).is_file():
        weight_map = SafetensorsFolder(checkpoint.folder).weight_map
        names = tensor_shapes(checkpoint.config, shard)
        files = {weight_map[stored_name(name, weight_map, checkpoint.config)] for name in names}
    for file in sorted(files):
        _fetch(checkpoint.hub_id, file, checkpoint.folder.name)


def _digest_samples(digest: "hashlib._Hash", path: Path) -> None:
    """Add a little of every part of a file: a fine-tuned model has the same names and shapes, but hardly a weight."""
    with path.open("rb") as file:
        for part in range(SAMPLES):
            file.seek(path.stat().st_size * part // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))


def _from_architecture(model: "ModelSection", raw: dict[str, Any]) -> Checkpoint:
    source = f"model.architecture of model={model.name}"
    eos = _eos_ids(raw, source)
    return Checkpoint(model.name, None, parse_config(raw, source), eos, weights="dummy")


def _from_folder(model: "ModelSection", folder: Path, hub_id: str | None = None) -> Checkpoint:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; model.path must be a Hugging Face folder")
    raw = _read_json(path)
    config = parse_config(raw, str(path))
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    eos = tuple(dict.fromkeys((*_eos_ids(generation, str(generation_path)), *_eos_ids(raw, str(path)))))
    defaults = {key: generation[key] for key in SAMPLING_KEYS if generation.get(key) is not None}
    return Checkpoint(model.name, folder, config, eos, defaults, model.weights, hub_id)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _eos_ids(raw: dict[str, Any], source: str) -> tuple[int, ...]:
    """Every token that ends a text, as far as the file says."""
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise UserError(f"{source}: eos_token_id must be a token id or a list of them, not {as_json(value)}")
    return tuple(ids)


def _snapshot(hub_id: str) -> Path:
    """The folder of a hub repository's small files, in the library's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=SMALL_FILES))
    except Exception as error:  # the library lets errors of several HTTP stacks through
        raise _hub_error(hub_id, None, error) from error


def _fetch(hub_id: str, file: str, revision: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(hub_id, file, revision=revision)
    except Exception as error:
        raise _hub_error(hub_id, file, error) from error


def _hub_error(hub_id: str, file: str | None, error: Exception) -> UserError:
    """What to do about it; `file` is the one that was asked for, None the small ones together."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    log_in = "then log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, hub.GatedRepoError):
        reason = f"it is gated: ask for access at https://huggingface.co/{hub_id}, {log_in}"
    elif isinstance(error, hub.RepositoryNotFoundError):
        reason = f"the hub has no such repository, or none for you: if it is private, get access, {log_in}"
    elif isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        reason = "the repository has no such file; weights must be safetensors"
    elif constants.HF_HUB_OFFLINE:
        reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    else:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    what = f"{hub_id}: {file}" if file else f"{hub_id} is no local folder and"
    return UserError(
        f"model.path={what} cannot be fetched from the hub ({reason}); "
        "give a folder, or model.weights=dummy with a model that states its architecture"
    )
