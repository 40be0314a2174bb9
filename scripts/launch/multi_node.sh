#!/usr/bin/env bash
# The same on every machine, with RANK_OF_NODE 0, 1, ...; output_dir lies on a disk that all share.
#   NODES=4 RANK_OF_NODE=0 HEAD=10.0.0.1 scripts/launch/multi_node.sh recipe.yaml [key=value ...]
set -euo pipefail
recipe=${1:?a recipe}
shift
exec torchrun \
  --nnodes "${NODES:?number of machines}" \
  --node_rank "${RANK_OF_NODE:?this machine, from 0}" \
  --master_addr "${HEAD:?address of machine 0}" \
  --master_port "${PORT:-29500}" \
  --nproc_per_node "${PROCESSES:-8}" \
  -m mmkd.cli run "$recipe" "$@"
