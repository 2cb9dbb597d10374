#!/usr/bin/env bash
# The published recipe on several machines: run this same line on each, with the address of one.
#     recipes/two_nodes.sh HOST [FLAGS of train.py]
# A failed process restarts all of them from the newest checkpoint; OUTPUT has to be on a disk that
# every machine sees. NODES, GPUS (per machine) and PORT may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
HOST=${1:?the address of one of the machines, the same on each}
shift

# Without this, torchrun 2.14 connects restarted processes to the store of those before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="${NODES:-2}" --nproc-per-node="${GPUS:-8}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id=retinanet --rdzv-endpoint="$HOST:${PORT:-29500}" train.py \
    --scale-lr --output-dir "${OUTPUT:-runs/coco}" --resume auto "$@"
