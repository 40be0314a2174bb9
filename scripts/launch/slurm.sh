#!/usr/bin/env bash
#SBATCH --job-name=mmkd
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
# sbatch scripts/launch/slurm.sh recipe.yaml [key=value ...]
# Five minutes before its time is up the job is asked to save; queued again, it goes on.
set -euo pipefail
recipe=${1:?a recipe}
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SLURM_CPU_BIND=none
srun torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$head:29500" \
  --rdzv_id "$SLURM_JOB_ID" \
  -m mmkd.cli run "$recipe" "$@"
