#!/usr/bin/env bash
# One run on several machines, started by hand: the same command on each of them, at about the same time.
#
#   NODES=2 HEAD=10.0.0.1 recipes/torchrun.sh run.toml [--train.steps 2000 ...]
#
# NODES   machines that take part
# HEAD    address of one of them, which all can reach; it keeps the list of ranks
# PORT    a free port there (29500)
# RANKS   ranks a machine: its GPUs, or its CPU cores where it has none (gpu; or a number)
# RESTARTS  how often all ranks are started again from the newest checkpoint when one of them dies (3)
#
# `out` of the run file must be one folder that all machines see, on a file system with renames and locks (NFS, Lustre).
set -euo pipefail

: "${NODES:?how many machines take part}" "${HEAD:?the address of one machine, which all can reach}"

exec torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "${RANKS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-moewright}" \
    --max-restarts "${RESTARTS:-3}" \
    -m moewright train "$@"
