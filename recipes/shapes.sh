#!/usr/bin/env bash
# RetinaNet from scratch on the embedded data set: minutes on two CPU cores.
# Should reach AP >= 0.5; measured in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUTPUT=${OUTPUT:-runs/shapes}

"$PYTHON" train.py --dataset shapes --model retinanet_resnet50_fpn --min-size 128 --max-size 128 \
    --batch-size 4 --workers 0 --opt adamw --lr 3e-4 --wd 0.05 --clip-grad-norm 1 --amp bf16 \
    --epochs 6 --lr-steps 5 --warmup-steps 60 --eval-every 6 --print-freq 32 --keep-checkpoints 1 \
    --output-dir "$OUTPUT" --resume auto "$@"
"$PYTHON" -m tools.report "$OUTPUT"
