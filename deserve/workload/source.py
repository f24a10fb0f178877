"""`workload.source`: what it names, opened, and the lengths of what lies in it."""

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from deserve.batch import IntArray, Request, SamplingParams
from deserve.config import Config
from deserve.errors import UserError
from deserve.model import smollm2
from deserve.workload import batch_file, dialogues
from deserve.workload.fixed import Fixed
from deserve.workload.intake import Intake
from deserve.workload.item import Item, Lengths, Limits, ModelNames, Rejected, Tokenizer
from deserve.workload.records import data_files
from deserve.workload.sampling import choices, default_sampling
from deserve.workload.sharing import WINDOW, alike, sharing

T = TypeVar("T")


# Errors of single requests whose cause lies in the job: where they meet every request, the job is refused instead.
CAUSED_BY_THE_JOB = ("no_tokenizer", "no_chat_template", "model_not_found")


def check_source(config: Config) -> None:
    """Look at `workload.source` without reading it. Raises UserError if it is missing or in no known form."""
    source, path = config.workload.source, _batch_file(config.workload.source)
    if path is not None:
        next(batch_file.lines(path, config.workload.max_line_mb), None)
    elif source in dialogues.SOURCES:
        data_paths(config)
    else:
        Fixed.parse(source, config.workload.shared_tokens)


def open_workload(
    config: Config,
    tokenizer: Tokenizer | None,
    limits: Limits,
    defaults: SamplingParams | None = None,
    ignored: Counter[str] | None = None,
    done: Container[str] = (),
) -> Iterator[Item]:
    """The first `workload.limit` items of `workload.source`, made as they are asked for.

    `defaults` come from `default_sampling`; without them the model's own generation settings do not count. `ignored`
    counts the keys that `workload.unknown_keys=ignore` passes over, as they are met. A request whose `custom_id` is in
    `done` becomes an `Answered`, neither checked nor tokenised.
    Raises UserError at once for a source that is malformed, missing, unreadable, too long for the model
    (synthetic prompts only, others are rejected one by one), or that needs a tokenizer where there is none.
    """
    defaults = defaults or default_sampling(config.sampling, {})
    intake = _intake(config, tokenizer, limits, defaults, Counter() if ignored is None else ignored)
    return islice(_items(config, intake, done), config.workload.limit)


def peek_lengths(
    config: Config,
    tokenizer: Tokenizer | None,
    limits: Limits,
    sample: int = 256,
    defaults: SamplingParams | None = None,
) -> Lengths:
    """How long the requests are, from up to `sample` of them; a JSONL file's are spread over the whole file.

    Where the sample holds no request at all, the lengths are those of a prompt of one token. Raises UserError
    as `open_workload` does, and where the job itself is why none of the sample can be answered.
    """
    defaults = defaults or default_sampling(config.sampling, {})
    limit = config.workload.limit
    source = config.workload.source
    path = _batch_file(source)
    count: int | None = None
    page_size = config.kvcache.page_size
    runs: list[list[Item]] = []
    if path is not None:
        most = config.workload.max_line_mb
        count = sum(1 for _ in islice(batch_file.lines(path, most), limit))
        reader = batch_file.BatchFile(_intake(config, tokenizer, limits, defaults, Counter()), most)
        step = max(1, -(-count // sample))
        items = [reader.item(*line) for line in islice(batch_file.lines(path, most), 0, limit, step)]
        if step > 1 and config.kvcache.share_prefixes:
            near = alike(islice(batch_file.lines(path, most), limit), sample)
            wanted = {number for run in near for number in run}
            first = islice(batch_file.lines(path, most), WINDOW)
            found = {line[0]: reader.item(*line) for line in first if line[0] in wanted}
            runs = [[found[number] for number in run] for run in near]
    elif source in dialogues.SOURCES:
        items = list(islice(open_workload(config, tokenizer, limits, defaults), sample))
    else:
        fixed = Fixed.parse(source, config.workload.shared_tokens)
        fixed.check_fits(limits, defaults.max_tokens)
        lengths = replace(fixed.lengths(limits, defaults.max_tokens, limit), exact=runs_full(defaults))
        pages = fixed.shared // page_size if config.kvcache.share_prefixes else 0
        return replace(lengths, shared=float(pages * page_size))
    requests = [item for item in items if isinstance(item, Request)]
    refused = [item for item in items if isinstance(item, Rejected)]
    if refused and not requests and all(item.code in CAUSED_BY_THE_JOB for item in refused):
        raise UserError(
            f"workload.source={source}: none of the {len(refused)} requests looked at can be answered: "
            f"{refused[0].message}"
        )
    sequences = [sequence for request in requests for sequence in choices(request)]
    sizes = [(len(request.prompt), request.sampling.max_tokens) for request in sequences]
    whole = bool(sizes) and len(requests) == count
    shared, readers = 0.0, math.inf
    if config.kvcache.share_prefixes:
        shared, readers = sharing([_prompts(run) for run in runs or [items]], page_size)
    sizes = sizes or [(1, min(defaults.max_tokens, limits.max_context - 1))]
    prompts, outputs = zip(*sizes, strict=True)
    return Lengths(
        count=count,
        mean_prompt=sum(prompts) / len(sizes),
        mean_output=sum(outputs) / len(sizes),
        max_total=max(map(sum, sizes)),
        sizes=tuple(sizes) if whole else (),
        exact=all(runs_full(request.sampling) for request in requests),
        answers=len(sequences) / max(1, len(requests)),
        shared=shared,
        readers=readers,
    )


def _prompts(items: Iterable[Item]) -> list[IntArray]:
    """The prompt of each sequence that `items` ask for."""
    return [sequence.prompt for item in items if isinstance(item, Request) for sequence in choices(item)]


def runs_full(sampling: SamplingParams) -> bool:
    """Whether nothing ends an answer before `max_tokens`."""
    return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids


def data_paths(config: Config) -> list[Path]:
    """The files that the requests are read from; none for a synthetic workload or one from the hub."""
    source, path = config.workload.source, config.workload.path
    if source in dialogues.SOURCES:
        return [] if path is None else data_files(Path(path).expanduser())
    batch = _batch_file(source)
    return [] if batch is None else [batch]


def _batch_file(source: str) -> Path | None:
    """The JSONL file that `workload.source` names, or None where it names something else."""
    path = Path(source).expanduser()
    named = source.endswith(".jsonl") or path.is_file()
    return path if named and source not in dialogues.SOURCES else None


def _intake(
    config: Config, tokenizer: Tokenizer | None, limits: Limits, defaults: SamplingParams, ignored: Counter[str]
) -> Intake:
    return Intake(
        tokenizer,
        limits,
        defaults,
        _model_names(config),
        ignored if config.workload.unknown_keys == "ignore" else None,
        config.workload.reasoning,
    )


def _model_names(config: Config) -> ModelNames | None:
    """What requests may call the model, None for anything."""
    more, model = config.workload.model_names, config.model
    if more == "any":
        return None
    names = [model.name, *([] if more == "auto" else more)]
    if model.path is None and model.name == smollm2.NAME:
        names.append(smollm2.HUB_ID)
    folder = None
    if model.path is not None:
        path = Path(model.path).expanduser()
        folder = path.resolve().name if path.is_dir() else None
        names += [model.path, str(path), folder or path.name]
    return ModelNames(tuple(dict.fromkeys(names)), folder)


def _items(config: Config, intake: Intake, done: Container[str]) -> Iterator[Item]:
    source, most = config.workload.source, config.workload.max_line_mb
    path = _batch_file(source)
    if path is not None:
        reader = batch_file.BatchFile(intake, most, done)
        return (reader.item(*line) for line in _started(batch_file.lines(path, most)))
    if source in dialogues.SOURCES:
        if intake.tokenizer is None:
            raise UserError(
                f"workload.source={source} holds text, and the model has no tokenizer: give a model folder that "
                "has one, or prompts of token ids"
            )
        return _started(dialogues.items(source, config.workload.path, intake, most, done))
    fixed = Fixed.parse(source, config.workload.shared_tokens)
    fixed.check_fits(intake.limits, intake.defaults.max_tokens)
    return fixed.requests(intake.limits, intake.defaults, done)


def _started(generator: Iterator[T]) -> Iterator[T]:
    """`generator` with its first value already made, so that what keeps it from starting is raised now."""
    return chain(list(islice(generator, 1)), generator)
