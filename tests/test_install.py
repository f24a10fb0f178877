"""The wheel: whole, and good for running anywhere."""

import importlib
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from launch import ROOT, python

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = folder.glob("deserve-*.whl")
    return wheel


def test_it_holds_the_package_and_its_configuration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [file for kind in ("py", "c", "html") for file in ROOT.glob(f"deserve/**/*.{kind}")]
    for file in [*ROOT.glob("conf/**/*.yaml"), *package]:
        name = file.relative_to(ROOT)
        assert str(name if name.parts[0] == "deserve" else Path("deserve") / name) in names
    assert all(name.startswith(("deserve/", "deserve-")) for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_runs_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True, timeout=120
    )
    job = ["model=tiny", "workload.source=fixed3:8:2", "sampling.max_tokens=4", "sampling.ignore_eos=true"]
    done = python("-m", "deserve.run", *job, cwd=elsewhere, path=[site])
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((elsewhere / "outputs" / "metrics.json").read_text())
    assert (metrics["requests"], metrics["errors"], metrics["output_tokens"]) == (3, 0, 12)
    where = python("-c", "import deserve; print(deserve.__file__)", cwd=elsewhere, path=[site])
    assert where.stdout.startswith(str(site))


def test_another_version_of_flashinfer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, before a call of something that has changed; the number is that of the extra `gpu`."""
    names = {"activation": "act_and_mul", "norm": "norm", "page": "page", "prefill": "batch_prefill", "rope": "rope"}
    package = ModuleType("flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    for name, kind in names.items():
        module = ModuleType(f"flashinfer.{name}")
        setattr(module, f"get_{kind}_module", None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "deserve.model.backend.flashinfer", raising=False)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = [item.removeprefix("flashinfer-python==") for item in extras["gpu"]]

    package.__version__ = f"{pinned}+cu130"
    assert pinned == importlib.import_module("deserve.model.backend.flashinfer").FLASHINFER
    del sys.modules["deserve.model.backend.flashinfer"]
    package.__version__ = "9.9.9"
    with pytest.raises(
        ImportError, match=rf"9\.9\.9 is installed, but {pinned} is needed: pip install 'deserve\[gpu\]'"
    ):
        importlib.import_module("deserve.model.backend.flashinfer")
