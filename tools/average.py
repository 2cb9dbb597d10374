"""Average the weights of checkpoints into one, often a better detector (SWA, arXiv 1803.05407).

    python -m tools.average runs/coco/model_{20..25}.pth --output averaged.pth

It averages what `--test-only` would evaluate: the EMA where a checkpoint has one. Batch statistics
are those of the last file. The result has no optimizer: it can be evaluated, used by
`tools.predict` and given as `--weights`, but no run continues from it.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.average")

from pathlib import Path
from typing import Any

import utils
from models.weights import Weights, read_weights
from runtime import checkpoint
from runtime.flags import ArgumentParser
from utils import UserError, run_command

BATCH_STATISTICS = ("running_mean", "running_var")
FLAGS = ("model", "anchor_sizes", "anchor_ratios")  # they decide what the tensors mean


def read_verified(path: Path) -> Weights:
    """Read a checkpoint of train.py.

    Raises:
        UserError: names it, if it is missing, not verified or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there, or is no file")
    if not utils.sidecar(path).is_file():
        raise UserError(f"{path} has no {path.name}.sha256 beside it, which train.py wrote")
    weights = read_weights(str(path), "checkpoint")
    if not weights.settings or weights.label_map is None:
        raise UserError(f"{path} is no checkpoint of train.py: it does not name its classes")
    return weights


def meaning(weights: Weights) -> dict[str, Any]:
    """Return what must be equal in checkpoints that are averaged, by name."""
    flags = {f"--{name.replace('_', '-')}": (weights.settings or {}).get(name) for name in FLAGS}
    shapes = {name: list(tensor.shape) for name, tensor in weights.state.items()}
    return {**flags, "the label map": weights.label_map, **shapes}


def average(paths: list[Path]) -> dict[str, Any]:
    """Return a checkpoint with the mean of the weights in `paths`, computed in float64.

    Raises:
        UserError: names a checkpoint that cannot be read, or does not fit the first; or if there
            are fewer than two, or one is given twice.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise UserError("give two checkpoints or more, each once")
    first = last = read_verified(paths[0])
    sums, expected = {k: v.double() for k, v in first.state.items()}, meaning(first)
    for last in map(read_verified, paths[1:]):
        actual = meaning(last)
        differing = [k for k in expected | actual if actual.get(k) != expected.get(k)]
        if differing:
            names = ", ".join(differing[:3])
            raise UserError(f"{last.source} and {first.source} have no mean: {names} differ")
        for name, tensor in last.state.items():
            sums[name] += tensor
    model = dict(last.state)
    for name, tensor in last.state.items():
        if tensor.is_floating_point() and not name.endswith(BATCH_STATISTICS):
            model[name] = (sums[name] / len(paths)).to(tensor.dtype)
    content = {"model": model, "ema": None, "args": last.settings, "categories": last.label_map}
    return content | {"versions": utils.versions(), "averaged": [str(path) for path in paths]}


def build_parser() -> ArgumentParser:
    """Declare the flags."""
    parser = ArgumentParser((__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", help="of one architecture and the same classes")
    add("--output", type=Path, default=Path("averaged.pth"), help="checkpoint to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Average, write, and print what was averaged."""
    flags = build_parser().parse_args(argv)
    if flags.output.exists() or checkpoint.is_checkpoint_name(flags.output.name):
        raise UserError(
            f"--output {flags.output}: exists, or is the name of a run's own checkpoint; choose "
            "another, such as averaged.pth"
        )
    content = average(flags.checkpoints)
    utils.make_folder(flags.output.parent)
    checkpoint.save(content, flags.output)
    print(f"{flags.output}: the mean of {len(flags.checkpoints)} checkpoints")


if __name__ == "__main__":
    run_command(main)
