"""What the documents name exists: keys, files, anchors, commands and their options. Every key is documented."""

import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from launch import ROOT
from omegaconf import DictConfig, OmegaConf

from deserve.config import config_dir

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
SCRIPTS = [*ROOT.glob("bench/**/*.s[hb]*"), *ROOT.glob("docs/**/*.sh")]
FILES = [str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*") if path.is_file()]
FILES += [path.name for path in ROOT.iterdir() if path.is_file()]


def keys(section: DictConfig, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name in map(str, section):
        value = section[name]
        found[prefix + name] = value
        if isinstance(value, DictConfig):
            found |= keys(value, f"{prefix}{name}.")
    return found


with initialize_config_dir(str(config_dir()), version_base=None):
    KEYS = keys(compose("plan"))  # those of config.yaml, and plan.yaml's
SECTIONS = [key for key, value in KEYS.items() if isinstance(value, DictConfig)]
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*\b(?!\()")
WRITTEN = {"steady.md"}  # by a command
NO_KEYS = {"model.safetensors", "model.safetensors.index.json", "stage.end_visit"}


def code(text: str) -> list[str]:
    """What `text` sets in code: spans, and lines of blocks, those that end in a backslash joined."""
    text = re.sub(r"[ ]*\\\n\s*", " ", text)
    blocks = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    blocks += [line for line in text.splitlines() if line.startswith("    ")]
    return blocks + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of `text`."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{name}: {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_exist(name: str) -> None:
    for text in code(TEXTS[name]):
        for file in re.findall(r"(?<![\w./<*-])\.?[\w./-]*\w\.(?:py|md|sh|yaml|toml|sbatch)\b", text):
            assert file in WRITTEN or any(known == file or known.endswith(f"/{file}") for known in FILES), (
                f"{name}: {file}"
            )


@pytest.mark.parametrize("name", TEXTS)
def test_keys_exist(name: str) -> None:
    for text in code(TEXTS[name]):
        for key in KEY.findall(text):
            free = key.startswith("model.architecture.") or key in NO_KEYS or key.endswith((".py", ".yaml", ".html"))
            assert free or key in KEYS, f"{name}: {key}"


def test_keys_in_scripts_and_comments_exist() -> None:
    for path in [*SCRIPTS, *ROOT.glob("conf/*.yaml"), ROOT / "Makefile"]:
        for key in KEY.findall(path.read_text()):
            assert key in KEYS or key.startswith("model.architecture."), f"{path}: {key}"


def test_every_key_is_documented() -> None:
    spans = {re.split("[= ]", span)[0] for text in TEXTS.values() for span in re.findall(r"`([^`\n]+)`", text)}
    assert sorted(set(KEYS) - set(SECTIONS) - spans) == []


def test_documented_defaults_are_the_defaults() -> None:
    rows = [line.split("|")[1] for line in TEXTS["docs/configuration.md"].splitlines() if line.startswith("| `")]
    stated = [span.split("=", 1) for row in rows for span in re.findall(r"`([\w.]+=[^`]+)`", row)]
    assert len(stated) > 50
    with initialize_config_dir(str(config_dir()), version_base=None):
        groups = OmegaConf.to_container(OmegaConf.load(config_dir() / "config.yaml")["defaults"])
    choices = {group: entry for part in groups if isinstance(part, dict) for group, entry in part.items()}
    for key, value in stated:
        default = choices.get(key, KEYS.get(key))
        assert default == yaml.safe_load(value), f"{key}={value}, but the default is {default}"


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist_and_know_their_options(name: str) -> None:
    for text in code(TEXTS[name]):
        for module, rest in re.findall(r"(?:-m ((?:bench|deserve)\.[\w.]+)|python (?:bench/\w+\.py))([^|#`]*)", text):
            if module.endswith(".X"):
                continue
            path = ROOT / (module.replace(".", "/") + ".py")
            if not module:
                (file,) = re.findall(r"python (bench/\w+\.py)", text)
                path = ROOT / file
            assert path.is_file(), f"{name}: {text}"
            source = path.read_text()
            shared = re.findall(r"^from (bench\.\w+) import", source, re.M)
            source += "".join((ROOT / (other.replace(".", "/") + ".py")).read_text() for other in shared)
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest):
                assert f'"{option}"' in source, f"{name}: {module or path.name} has no option {option}"
