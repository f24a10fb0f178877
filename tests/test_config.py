"""Every key of `conf/`: a value of the wrong type is refused by name, in one line."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from deserve.config import checked, config_dir, load_config
from deserve.errors import UserError
from deserve.plan import PlanConfig, load_plan_config

# A path or a name may look like anything that fits on a line.
TEXTS = {"model.name", "model.path", "workload.source", "workload.path", "workload.chat_template", "output.dir"}
TEXTS |= {"speculation.model", "report.metrics_host"}
LISTS = {"pipeline.partition", "sampling.stop", "model.architecture.architectures", "model.architecture.eos_token_id"}


def composed() -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base=None):
        return compose("plan", overrides=["model=llama-3.1-8b"])  # all keys of config.yaml, and plan.yaml's


def keys(section: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for name, value in section.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, DictConfig):
            found += keys(value, f"{found[-1]}.")
    return found


def wrong_values(key: str, value: Any) -> list[Any]:
    """What cannot stand where `value`, of the right type, stands."""
    if isinstance(value, DictConfig):
        return [[1], "word", 5, True]
    if key in TEXTS:
        return [[1], {"a": 1}]
    wrong: list[Any] = [[{}], {"a": 1}, 2**80, float("nan")]
    wrong += [["emb", None]] if key in LISTS else ["word"]
    return wrong + ([1] if isinstance(value, bool) else [True])


def test_every_key_refuses_what_is_of_another_type() -> None:
    config = composed()
    for key in keys(config):
        right = OmegaConf.select(config, key)
        for wrong in wrong_values(key, right):
            OmegaConf.update(config, key, wrong, merge=False)
            with pytest.raises(UserError) as raised:
                pytest.fail(f"{key} became {checked(config, PlanConfig, [])}")
            message = str(raised.value)
            assert key.rpartition(".")[2] in message and "\n" not in message, (key, wrong, message)
        OmegaConf.update(config, key, right, merge=False)
    assert checked(config, PlanConfig, []) == load_plan_config(["model=llama-3.1-8b"])


@pytest.mark.parametrize(
    "override",
    [
        "sampling.stop=[a,5]",
        "sampling.stop=''",
        "sampling.top_p=1.5",
        "sampling.temperature=inf",
        "time_limit_s=nan",
        "comm.timeout_s=inf",
        "output.dir=''",
        "output.resume=2",
        "report.metrics_port=65536",
        "report.metrics_host=''",
        "pipeline=5",
        "pipeline.partition=[emb,x]",
        "model.architecture=[1]",
        "model.architecture.hidden_size=many",
        "device={a: 1}",
        "trace=",
        "trace",
        "model=5",
    ],
)
def test_overrides_that_are_refused(override: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(["model=tiny", override])
    assert override.partition("=")[0].rpartition(".")[2] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("override", ["ranks=0", "memory_gb=inf", "host_memory_gb=-1", "stage.tflops=0"])
def test_plans_that_are_refused(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_plan_config([override])


@pytest.mark.parametrize("override", ["sampling.stop=[a]", "sampling.stop=a", "sampling.stop=null", "time_limit_s=1"])
def test_overrides_that_are_taken(override: str) -> None:
    key, _, value = override.partition("=")
    assert OmegaConf.select(OmegaConf.structured(load_config([override])), key) == OmegaConf.create(f"v: {value}").v
