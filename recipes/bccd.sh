#!/usr/bin/env bash
# RetinaNet with a ResNet-18 from scratch on blood cells: a small set, on two CPU cores.
#     DATA=bccd recipes/bccd.sh [FLAGS of train.py]
# Should reach AP 0.586 on its 72 validation images; measured in docs/results.md. DATA is BCCD
# in COCO layout, with train2017, val2017 and annotations.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUTPUT=${OUTPUT:-runs/bccd}
DATA=${DATA:?is not set: the folder of BCCD, with train2017, val2017 and annotations}

"$PYTHON" train.py --data-path "$DATA" --model retinanet_resnet18_fpn --min-size 320 \
    --max-size 427 --batch-size 4 --workers 1 --opt adamw --lr 5e-4 --wd 0.05 \
    --clip-grad-norm 1 --amp bf16 --epochs 15 --lr-steps 12 --warmup-steps 100 --eval-every 3 \
    --output-dir "$OUTPUT" --resume auto "$@"
"$PYTHON" -m tools.report "$OUTPUT"
