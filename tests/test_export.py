"""The exported model detects what PyTorch's does: pytest tests/test_export.py."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from helpers import CAT_AND_DOG
from torch import Tensor

from models.build import load_detector
from tools import export
from utils import UserError

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def exported(
    trained: Path,
    tiny_shapes: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("export") / "detector.onnx"
    images = str(tiny_shapes / "val2017")
    flags = ["--checkpoint", str(trained), "--output", str(path), "--check", images]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export.main(flags)
    return path, printed.getvalue()


def images_of_sizes(*sizes: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.rand(3, height, width) for height, width in sizes]


def test_the_same_objects_at_any_image_size(
    exported: tuple[Path, str],
    trained: Path,
) -> None:
    path, line = exported
    assert "find the same" in line and line.startswith(str(path))
    model = export.OneImage(load_detector(str(trained))[0]).eval()
    differ = export.compare(model, path, images_of_sizes((48, 64), (64, 48), (37, 90), (200, 150)))
    assert differ["detections"] > 100
    assert differ["pixels"] <= 0.1 and differ["scores"] <= 1e-4


def test_the_file_names_its_classes_and_outputs(exported: tuple[Path, str]) -> None:
    content = onnx.load(str(exported[0]))
    (categories,) = [json.loads(p.value) for p in content.metadata_props if p.key == "categories"]
    assert categories == CAT_AND_DOG
    assert [output.name for output in content.graph.output] == ["boxes", "scores", "labels"]
    sides = content.graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in sides] == [3, "height", "width"]


def test_another_model_does_not_pass_the_check(
    exported: tuple[Path, str],
    trained: Path,
) -> None:
    detector, _ = load_detector(str(trained))
    with torch.no_grad():
        detector.head.classification_head.cls_logits.bias += 0.01  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="scores by 0.00"):
        export.compare(export.OneImage(detector).eval(), exported[0], images_of_sizes((48, 64)))


def test_a_check_without_objects_is_refused(
    trained: Path,
    tmp_path: Path,
) -> None:
    detector, label_map = load_detector(str(trained), score_thresh=0.999)
    model = export.OneImage(detector).eval()
    export.to_onnx(model, images_of_sizes((48, 64))[0], label_map, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="the model finds no object"):
        export.compare(model, tmp_path / "m.onnx", images_of_sizes((48, 64)))


def test_without_images_the_export_reports_that_nothing_was_checked() -> None:
    with pytest.raises(UserError, match="--check"):
        export.images_to_check([], None)


def test_an_image_that_cannot_be_checked_is_named(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "cut.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cut.jpg: is no JPEG.*; give others with --check"):
        export.main(["--checkpoint", str(trained), "--check", str(path)])
