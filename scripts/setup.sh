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
# lmms-eval's own dependency list brings a torchvision that breaks beside a CPU torch.
$PIP --no-deps "lmms-eval==0.7.3"
# The processors of most families need torchvision, in the build that belongs to the installed
# torch; any other breaks transformers, and is removed again.
if ! "$VENV/bin/python" -c "import torchvision" 2>/dev/null; then
    FITTING="$("$VENV/bin/python" -c \
        "from mmkd.doctor.packages import fitting_torchvision; print(fitting_torchvision())")"
    case "$FITTING" in "pip install --no-deps "*)
        $PIP --retries 0 --timeout 15 ${FITTING#pip install } >/dev/null 2>&1 || true
        if ! "$VENV/bin/python" -c "import torchvision" 2>/dev/null; then
            "$VENV/bin/pip" uninstall --quiet --yes torchvision >/dev/null 2>&1 || true
        fi
    esac
    "$VENV/bin/python" -c "import torchvision" 2>/dev/null || "$VENV/bin/python" -c \
        "from mmkd.doctor.packages import without_torchvision; print(without_torchvision())"
    "$VENV/bin/python" -c "import torchvision" 2>/dev/null || echo "torchvision: $FITTING"
fi
