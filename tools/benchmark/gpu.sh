#!/usr/bin/env bash
# Measure this project on one GPU, for docs/benchmarks.md, and check what only a GPU can show.
#
#     bash tools/benchmark/gpu.sh step      # the training step against torchvision's, every row
#     bash tools/benchmark/gpu.sh resume    # tests: no waits, the same bits after a resume
#     bash tools/benchmark/gpu.sh eval      # detection and COCO scoring
#
# DEVICE=cpu with a small model and `--steps 1 --repeats 1` shows on any machine that it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
DEVICE=${DEVICE:-cuda}
what=$1
shift
[ "$DEVICE" = cpu ] || nvidia-smi --list-gpus

benchmark() {
    echo "# tools.benchmark $*"
    "$PYTHON" -m tools.benchmark "$@" --device "$DEVICE"
}

case $what in
step)
    dtypes="fp32 tf32 bf16"
    [ "$DEVICE" = cuda ] || dtypes="fp32 bf16"
    for batch in 2 16; do
        for dtype in $dtypes; do
            benchmark step --batch-size "$batch" --dtype "$dtype" "$@"
        done
        benchmark step --batch-size "$batch" --dtype bf16 --box-subnet sparse "$@"
        benchmark step --batch-size "$batch" --dtype bf16 --compile "$@"
    done
    ;;
resume) "$PYTHON" -m pytest -m gpu -rs "$@" ;;
eval) benchmark eval --dtype bf16 --batch-size 8 "$@" ;;
esac
