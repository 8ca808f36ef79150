#!/usr/bin/env bash
# Pre-training without Slurm; on every node the same line, and HOST is the first one's name:
#
#   examples/slurm/torchrun.sh stage1-vitg --micro-batch-size 105
#   NODES=2 HOST=node-1 examples/slurm/torchrun.sh stage1-vitg --micro-batch-size 105
#
# Ctrl-C or SIGTERM has every process save its state; the same line goes on. GPUS is what a node has.
set -euo pipefail
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HOST:-localhost}:${PORT:-29500}" --rdzv-id blip2 \
    -m train.pretrain "$@"
