"""The benchmark of the hardware's limits, on a CPU."""

import json
from typing import Any

import pytest
import torch

from bench.roofline import Peak, main, shares
from deserve.config import load_config
from deserve.model.checkpoint import resolve

QUICK = ["--repeats", "1", "--device", "cpu"]


def cells(text: str) -> list[list[str]]:
    """The rows of the only Markdown table in `text`, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def run_metrics(model: dict[str, Any]) -> dict[str, Any]:
    """What a run of two ranks would have written: requests of 512 tokens in and 256 out, and some refused."""
    return {
        "requests": 110,
        "errors": 10,
        "input_tokens": 100 * 512,
        "output_tokens": 100 * 256,
        "elapsed_s": 10.0,
        "output_tokens_per_s": 2560.0,
        "warmup_s": 2.0,
        "after_warmup": {"output_tokens_per_s": 2600.0},
        "stages": [{"busy": 0.9, "visits": 400}, {"busy": 0.8, "visits": 400}],
        "plan": {"partition": [0, 40]},
        "config": {"model": model},
    }


def test_visits_are_measured_beside_their_limits(capsys):
    sizes = ["--layers", "2", "--context", "16", "40", "--decode", "2", "4", "--mixed", "3", "0", "--tokens", "20"]
    main(["tiny", *sizes, *QUICK])
    rows = cells(capsys.readouterr().out)
    assert [row[1] for row in rows] == [
        "2 decode of 16",
        "4 decode of 16",
        "2 decode of 40",
        "4 decode of 40",
        "3 decode of 16 + 17 prefill",
        "3 decode of 40 + 17 prefill",
        "20 prefill",
    ]
    for row in rows:
        assert row[0] == "tiny, 2 layers" and row[2] == "eager"
        products, floor, measured, over_floor = (float(row[column]) for column in (4, 5, 6, 7))
        assert 0 < products <= floor and measured > 0
        assert over_floor == pytest.approx(measured / floor, rel=0.1, abs=0.01)


def test_a_context_that_the_model_does_not_take_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["tiny", "--context", "5000", "--decode", "1", *QUICK])
    assert "contexts of 2048 tokens, not of 5000" in capsys.readouterr().err


def test_limits_of_a_run_of_llama_3_70b():
    config = resolve(load_config(["model=llama-3-70b", "model.weights=dummy"]).model).config
    bf16, peak = torch.bfloat16, Peak(4e12, 788e12)
    first, last = shares(run_metrics({}), peak, config, bf16)
    assert (first.layers, first.visits, first.busy, first.tokens) == (40, 400, 0.9, 100 * 767 / 400)
    # 34.2 billion parameters each, of which 2 operations a token; attention, and the output layer, add some percents
    assert 256 * 788e12 / (2 * 34.2e9 * 767) * 0.98 < first.by_rate < 256 * 788e12 / (2 * 34.2e9 * 767)
    assert 0.97 * first.by_rate < last.by_rate < first.by_rate
    kv_bytes = 100 * sum([512, *range(513, 768)]) * 2 * 8 * 128 * 2 * 40
    assert first.by_bandwidth == pytest.approx(25600 * 4e12 / (400 * 2 * 34.2252e9 + kv_bytes), rel=1e-3)
    for share in (first, last):
        assert share.by_both <= share.by_bandwidth


def test_a_run_beside_its_limits(tmp_path, capsys):
    metrics = run_metrics(vars(load_config(["model=tiny"]).model))
    metrics["plan"]["partition"] = [0, 2]
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(metrics))
    main(["--end-to-end", str(path), *QUICK])
    text = capsys.readouterr().out
    assert "tiny: 100 requests of 512 tokens in and 256 out in 10.0 s: 2,560.0 output tokens/s, 2,600.0 after" in text
    assert [row[:5] for row in cells(text)] == [["0", "2", "400", "191.8", "90 %"], ["1", "2", "400", "191.8", "80 %"]]


def test_experts_are_read_as_far_as_tokens_touch_them() -> None:
    """Qwen3-30B-A3B: 9.4 MB an expert, 8 of 128 for each token, and 38.3 MB beside them."""
    config = resolve(load_config(["model=qwen3-30b-a3b", "model.weights=dummy"]).model).config
    for tokens, touched in ((1, 8), (64, 125.9)):
        assert Peak(4e12, 700e12).layer_s(config, 2, tokens) == pytest.approx((38.3e6 + touched * 9.44e6) / 4e12, 0.01)
