#!/usr/bin/env bash
# All GPUs of this machine: scripts/launch/single_node.sh recipe.yaml [key=value ...]
# PROCESSES=4 takes four of them.
set -euo pipefail
recipe=${1:?a recipe}
shift
processes=${PROCESSES:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}
exec mmkd run "$recipe" "$@" --nproc "$processes"
