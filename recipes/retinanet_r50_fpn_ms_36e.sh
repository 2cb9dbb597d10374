#!/usr/bin/env bash
# Three times as long, at several sizes.
#     DATA=/coco recipes/retinanet_r50_fpn_ms_36e.sh [FLAGS of train.py]
# Should come near AP 39.5 on val2017: published by MMDetection
# (retinanet_r50_fpn_ms-640-800-3x_coco), not yet measured here. What differs from it: shorter sides
# are 480 to 800 in steps of 32, torchvision's, where MMDetection's are any from 640 to 800; and
# batch normalisation is frozen here. Its 12 epochs of three passes each are 36 here, and the
# decays after 9 and 11 of them 27 and 33. 8 GPUs with 2 images each.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:?is not set: the folder of COCO, with train2017, val2017 and annotations}

exec torchrun --nproc_per_node="${GPUS:-8}" train.py --data-path "$DATA" \
    --model retinanet_resnet50_fpn --weights-backbone ResNet50_Weights.IMAGENET1K_V1 \
    --data-augmentation multiscale --opt sgd --lr 0.01 --scale-lr --wd 1e-4 --batch-size 2 \
    --epochs 36 --lr-steps 27 33 --warmup-steps 500 --eval-every 3 \
    --output-dir "${OUTPUT:-runs/retinanet_r50_fpn_ms_36e}" --resume auto "$@"
