#!/usr/bin/env bash
# Creates the virtual environment. torch comes first: a later package could pull another build.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
PIP="$VENV/bin/pip install --quiet --disable-pip-version-check"

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
echo "installing into $VENV (a few minutes the first time)"
"$VENV/bin/python" -c "import torch" 2>/dev/null || $PIP "torch==2.13.0"
$PIP -e ".[dev]"
# lmms-eval's own dependency list installs a torchvision that does not work with a CPU torch.
$PIP --no-deps "lmms-eval==0.7.3"
# The processors of most families need torchvision, in the build for the installed torch. Any other
# build breaks transformers, so it is removed again.
python() { "$VENV/bin/python" -c "$1"; }
has_torchvision() { python "import torchvision" 2>/dev/null; }
PACKAGES="from mmkd.commands.doctor.packages import fitting_torchvision, without_torchvision"
if ! has_torchvision; then
    FITTING="$(python "$PACKAGES; print(fitting_torchvision())")"
    case "$FITTING" in "pip install --no-deps "*)
        $PIP --retries 0 --timeout 15 ${FITTING#pip install } >/dev/null 2>&1 || true
        has_torchvision || "$VENV/bin/pip" uninstall --quiet --yes torchvision >/dev/null 2>&1 || true
    esac
    if ! has_torchvision; then
        python "$PACKAGES; print(without_torchvision())"
        echo "torchvision: $FITTING"
    fi
fi
