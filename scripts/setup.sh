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
