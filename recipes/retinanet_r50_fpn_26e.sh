#!/usr/bin/env bash
# torchvision's recipe for retinanet_resnet50_fpn, which the defaults of train.py are:
#     DATA=/coco recipes/retinanet_r50_fpn_26e.sh [FLAGS of train.py]
# Should reach AP 36.4 on val2017: published by torchvision, as that of
# RetinaNet_ResNet50_FPN_Weights.COCO_V1; not yet measured here. The rate is for 16 images per step
# and scales with them: 8 GPUs with 2 images each. GPUS=1 and --batch-size 16 is the same recipe, and
# so is --batch-size 8 --accumulate-steps 2 on a smaller card.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:?is not set: the folder of COCO, with train2017, val2017 and annotations}

exec torchrun --nproc_per_node="${GPUS:-8}" train.py --data-path "$DATA" \
    --model retinanet_resnet50_fpn --weights-backbone ResNet50_Weights.IMAGENET1K_V1 \
    --opt sgd --lr 0.01 --scale-lr --wd 1e-4 --batch-size 2 --epochs 26 --lr-steps 16 22 \
    --output-dir "${OUTPUT:-runs/retinanet_r50_fpn_26e}" --resume auto "$@"
