"""A folder of safetensors files: which file holds which tensor, header checks, and reading single tensors.

With an index, only the files that it names count; without one, `model.safetensors` or the folder's only file.
Other files beside them (`consolidated.safetensors`, `original/`, adapters) change nothing.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deserve.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # anything narrower is quantised and needs scales
SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")

# Tensors that a model may leave unread without changing its output.
HARMLESS = re.compile(
    # Rotary tables, saved by old versions of transformers; they follow from config.json.
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    # The numbers 0, 1, 2, ..., which old versions saved as a buffer.
    r"|(^|\.)position_ids$"
)

Shape = tuple[int, ...]


class SafetensorsFolder:
    """The weights in `path`. `weight_map`: the file that holds each tensor.

    Raises UserError for a folder without safetensors and an unreadable index or header.
    """

    def __init__(self, path: Path):
        self.path = path
        self.weight_map = _read_weight_map(path)

    @property
    def source(self) -> Path:
        """What says which tensors there are: the index, or the only file."""
        index = self.path / INDEX
        return index if index.is_file() else _single_file(self.path)

    def check(
        self,
        expected: Mapping[str, Shape],
        files: Iterable[str],
        spare: Container[str] = (),
        kinds: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Compare the whole index, and the headers of `files`, with the `expected` tensors; reads no weights.

        Raises UserError, naming file and tensor, for a tensor that is missing, that has another shape or a type that
        is none of its `kinds` (by default floats), that is neither expected nor `spare` nor harmless, and for a file
        that is missing or damaged.
        """
        missing = [name for name in expected if name not in self.weight_map]
        if missing:
            raise UserError(f"{self.source}: no tensor {_listed(missing)}, which config.json calls for")
        self._refuse_unasked(self.source, self.weight_map, expected, spare)
        files = sorted(files)
        absent = [file for file in files if not (self.path / file).is_file()]
        if absent:
            raise UserError(
                f"{self.path}: {len(absent)} of the {len(set(self.weight_map.values()))} files that {INDEX} names are "
                f"missing ({_listed(absent)}): {_half_a_download(self.path)}"
            )
        for file in files:
            self._check_header(file, expected, spare, kinds or {})

    def read(self, name: str, target: Tensor) -> None:
        """Copy the tensor `name` into `target`, which has its shape, and convert its type."""
        path = self.path / self.weight_map[name]
        # Opened anew for each tensor: pages of the mapped file stay in memory only as long as it is open.
        with _opened(path, name) as opened:
            target.copy_(opened.get_tensor(name))

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """A copy of the tensor `name` on `device`, in its own type."""
        with _opened(self.path / self.weight_map[name], name) as opened:
            return opened.get_tensor(name).to(device, copy=True)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values."""
        one, other = (self.path / self.weight_map[name] for name in (first, second))
        with _opened(one, first) as opened, _opened(other, second) as also:
            return torch.equal(opened.get_tensor(first), also.get_tensor(second))

    def _check_header(
        self, file: str, expected: Mapping[str, Shape], spare: Container[str], kinds: Mapping[str, tuple[str, ...]]
    ) -> None:
        path = self.path / file
        with _opened(path) as opened:
            held = set(opened.keys())
            for name, shape in expected.items():
                if self.weight_map[name] != file:
                    continue
                if name not in held:
                    raise UserError(f"{path}: no tensor {name}, which {INDEX} says it holds")
                header = opened.get_slice(name)
                found = list(header.get_shape())
                # A single number may have no dimension.
                if found != list(shape) and not (shape == (1,) and found == []):
                    raise UserError(f"{path}: {name} has shape {found}, config.json calls for {list(shape)}")
                allowed = kinds.get(name, FLOATS)
                if header.get_dtype() not in allowed:
                    raise UserError(f"{path}: {name} holds {header.get_dtype()}, expected one of {', '.join(allowed)}")
            self._refuse_unasked(path, held, expected, spare)

    @staticmethod
    def _refuse_unasked(source: Path, names: Iterable[str], expected: Container[str], spare: Container[str]) -> None:
        unasked = [name for name in names if name not in expected and name not in spare and not HARMLESS.search(name)]
        if unasked:
            raise UserError(
                f"{source}: holds {_listed(sorted(unasked))}, which config.json does not call for: the answers would "
                "be those of another model. Use the config.json that belongs to these weights"
            )


def is_lfs_pointer(path: Path) -> bool:
    """Whether git put a file's address in its place, as it does where its large file storage is not installed."""
    with path.open("rb") as file:
        return file.read(20) == b"version https://git-"


def _read_weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    if not index.is_file():
        single = _single_file(folder)
        with _opened(single) as opened:
            return dict.fromkeys(opened.keys(), single.name)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: holds no readable weight_map ({type(error).__name__}: {error})") from error


def _single_file(folder: Path) -> Path:
    """The only safetensors file of a folder without index."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE in files:
        return folder / SINGLE
    parts = [file.name for file in files if SHARD_NAME.search(file.name)]
    if parts:
        raise UserError(f"{folder}: {_listed(parts)}, but no {INDEX} to say what they hold: {_half_a_download(folder)}")
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files, but no {INDEX} to say what they hold")
    if any(folder.glob("*.bin")):
        raise UserError(f"{folder}: only .bin files; save the model as safetensors (save_pretrained does)")
    unfinished = f": {_half_a_download(folder)}" if _unfinished_files(folder) else ""
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX}{unfinished}")


def _half_a_download(folder: Path) -> str:
    """What to say of a folder that lacks files."""
    unfinished = _unfinished_files(folder)
    traces = f" ({_listed(unfinished)} is unfinished)" if unfinished else ""
    return f"half a download{traces}; fetch the model again, finished files are kept"


def _unfinished_files(folder: Path) -> list[str]:
    # The hub's library keeps them below .cache/huggingface/download, or beside what the links in its cache point to.
    places = (folder, folder / ".cache" / "huggingface" / "download", folder.parent.parent / "blobs")
    return sorted(path.name for place in places for path in place.glob("*.incomplete"))


def _listed(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@contextmanager
def _opened(path: Path, tensor: str = "its header") -> Iterator[Any]:
    """A safetensors file; whatever goes wrong with it is a UserError naming the file and the tensor."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        if path.is_file() and is_lfs_pointer(path):
            raise UserError(f"{path}: only a pointer to the weights; `git lfs pull` fetches them") from error
        raise UserError(f"{path}: cannot read {tensor} ({error}): truncated or corrupt") from error
