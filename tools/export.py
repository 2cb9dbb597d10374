"""Write a detector as ONNX, for images of any size, and check it against PyTorch on real images.

    python -m tools.export --checkpoint runs/coco/best.pth --output detector.onnx
    python -m tools.export --weights RetinaNet_ResNet50_FPN_Weights.COCO_V1 --check photos/

The model takes one image, float32 `[3, height, width]` in 0..1, and gives `boxes` [n, 4] xyxy in
its pixels, `scores` [n] and `labels` [n]; resizing, NMS and the score threshold are part of it. The
file names its classes (metadata "categories", JSON). Needs the extra `export`.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.export")

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from data.splits import data_paths
from models import retinanet
from models.build import load_detector
from runtime import checkpoint
from runtime.flags import ArgumentParser
from tools import predict
from utils import UserError, file_errors, run_command

OPSET = 17
OUTPUTS = ("boxes", "scores", "labels")
MOST_PIXELS, MOST_SCORE = 0.1, 1e-4  # that ONNX Runtime may differ by
CHECKED = 4  # images, unless others are given


class OneImage(nn.Module):
    """A detector of one image: `[3, H, W]` in 0..1 → boxes, scores, labels."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        # torchvision's own detection and transform can be traced for any image size.
        if isinstance(detector, retinanet.RetinaNet):
            detector.__class__ = torchvision.models.detection.RetinaNet
        ours: Any = detector.transform
        detector.transform = GeneralizedRCNNTransform(
            ours.min_size,
            ours.max_size,
            ours.image_mean,
            ours.image_std,
            size_divisible=ours.size_divisible,
            fixed_size=ours.fixed_size,
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return boxes [n, 4] xyxy, scores [n] and labels [n], best first."""
        (detections,) = self.detector([image])
        return tuple(detections[name] for name in OUTPUTS)


def to_onnx(
    model: OneImage, image: Tensor, label_map: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Write `model` to `path`, traced on `image` `[3, H, W]`, best one with objects."""
    import onnx

    names = {1: "height", 2: "width"}
    with warnings.catch_warnings():
        # The newer exporter is built on torch.export, which fails where shapes depend on what a
        # detector finds (docs/see_it.md). The older one traces, and warns that it is deprecated.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (image,),
            str(path),
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={"image": names, **{name: {0: "detections"} for name in OUTPUTS}},
            opset_version=OPSET,
            dynamo=False,
        )
    content = onnx.load(str(path))
    onnx.helper.set_model_props(content, {"categories": json.dumps(list(label_map))})
    onnx.save(content, str(path))


@torch.inference_mode()
def compare(model: OneImage, path: Path, images: Sequence[Tensor]) -> dict[str, float]:
    """Run the file at `path` in ONNX Runtime and `model` on `images`; return how they differ.

    Returns:
        The number of "detections", and the largest difference of "pixels" and "scores".

    Raises:
        UserError: if one finds what the other does not, they differ by more than `MOST_PIXELS` or
            `MOST_SCORE`, or nothing is found, which would prove nothing.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count, pixels, most = 0, 0.0, 0.0
    for number, image in enumerate(images):
        expected = [value.numpy() for value in model(image)]
        boxes, scores, labels = session.run(None, {"image": image.numpy()})
        if len(boxes) != len(expected[0]):
            raise UserError(
                f"image {number + 1}: ONNX Runtime finds {len(boxes)} objects, PyTorch "
                f"{len(expected[0])}"
            )
        # In pairs: equal scores may come in another order.
        apart = np.abs(boxes[:, None] - expected[0][None]).max(axis=2, initial=0)
        apart[labels[:, None] != expected[2][None]] = np.inf
        mate = apart.argmin(axis=1) if len(boxes) else np.empty(0, int)
        if len(set(mate.tolist())) < len(mate):
            raise UserError(f"image {number + 1}: ONNX Runtime finds other objects than PyTorch")
        count += len(boxes)
        pixels = max(pixels, float(apart.min(axis=1, initial=np.inf).max(initial=0)))
        most = max(most, float(np.abs(scores - expected[1][mate]).max(initial=0)))
    if pixels > MOST_PIXELS or most > MOST_SCORE:
        raise UserError(
            f"boxes differ by up to {pixels:.3g} pixels and scores by {most:.3g}; at most "
            f"{MOST_PIXELS} and {MOST_SCORE} are allowed"
        )
    if count == 0:
        raise UserError("the model finds no object in these images; give others with --check")
    return {"detections": count, "pixels": pixels, "scores": most}


def images_to_check(names: Sequence[str], source: str | None) -> list[Path]:
    """Return the images of `--check`, by default some validation images of the checkpoint's data.

    Raises:
        UserError: if there are none.
    """
    if not names and source:
        args = checkpoint.load(Path(source)).get("args", {})
        data_path, images = (
            Path(args[k]) if args.get(k) else None for k in ("data_path", "val_images")
        )
        paths = data_paths(args.get("dataset", "coco"), data_path, {"val_images": images})
        if paths["val_images"].is_dir():
            return predict.find_images([str(paths["val_images"])])[:CHECKED]
    if not names:
        raise UserError("no images to check the file on; give --check FILES or a folder")
    return predict.find_images(names)


def build_parser() -> ArgumentParser:
    """Declare the flags."""
    parser = ArgumentParser((__doc__ or "").split("\n\n")[0])
    predict.add_model_flags(parser)
    add = parser.add_argument
    add("--format", choices=("onnx",), default="onnx", help="of the file")
    add("--output", type=Path, default=Path("detector.onnx"), help="file to write")
    check = "images for the check; some of the run's validation images if not given"
    add("--check", nargs="+", default=[], metavar="IMAGE", help=check)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Export, check, and print how far the two are apart."""
    flags = build_parser().parse_args(argv)
    paths = images_to_check(flags.check, flags.checkpoint)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[export]'") from None
    detector, label_map = load_detector(flags.checkpoint or flags.weights)
    model = OneImage(detector).eval()
    files, images = predict.ImageFiles(paths, detector.transform), []
    for number, path in enumerate(paths):
        _, image = files[number]
        if isinstance(image, str):
            raise UserError(f"{path}: {image}; give others with --check")
        images.append(image / 255)
    with torch.inference_mode():
        counts = [len(model(image)[0]) for image in images]
    with file_errors("write", flags.output):
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        to_onnx(model, images[int(np.argmax(counts))], label_map, flags.output)
    differ = compare(model, flags.output, images)
    print(
        f"{flags.output}: on {len(images)} images PyTorch and ONNX Runtime find the same "
        f"{differ['detections']} objects; boxes differ by {differ['pixels']:.2g} pixels at most, "
        f"scores by {differ['scores']:.2g}"
    )


if __name__ == "__main__":
    run_command(main)
