#!/usr/bin/env bash
# torchvision's recipe for its second RetinaNet: batch normalisation that trains, P6 from C5, group
# normalisation in the heads, GIoU loss.
#     DATA=/coco recipes/retinanet_r50_fpn_v2_26e.sh [FLAGS of train.py]
# Should reach AP 41.5 on val2017: published by torchvision, with this command line, in
# pytorch/vision#5756; not yet measured here. 8 GPUs with 2 images each. With fewer GPUs raise
# --batch-size: batch normalisation sees all images of a batch, but not those of --accumulate-steps.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:?is not set: the folder of COCO, with train2017, val2017 and annotations}

exec torchrun --nproc_per_node="${GPUS:-8}" train.py --data-path "$DATA" \
    --model retinanet_resnet50_fpn_v2 --weights-backbone ResNet50_Weights.IMAGENET1K_V2 \
    --data-augmentation multiscale --sync-bn --opt adamw --lr 1e-4 --scale-lr --wd 0.05 \
    --norm-weight-decay 0 --batch-size 2 --epochs 26 --lr-steps 16 22 \
    --output-dir "${OUTPUT:-runs/retinanet_r50_fpn_v2_26e}" --resume auto "$@"
