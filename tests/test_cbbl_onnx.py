"""Laws of cbbl_onnx.py: it treats an image as Detectron2 and this project do."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import cbbl_onnx  # noqa: E402
from cbbl_onnx import Detector, OnnxError, read_image  # noqa: E402

METADATA = {
    "class_names": '["a", "b"]',
    "category_ids": "[3, 7]",
    "input_format": "BGR",
    "min_size": "100",
    "max_size": "150",
    "score_threshold": "0.05",
    "nms_threshold": "0.5",
    "max_detections": "100",
}
# In the resized image: one reaches beyond its right side, one lies behind it.
BOXES = [[10, 20, 30, 60], [-5, 90, 1000, 95], [2000, 10, 2010, 20]]


@pytest.fixture
def write_model(tmp_path):
    """
    ``write_model(**metadata)``: path of a model that always finds :data:`BOXES`, the score of the
    first being the share of the image's first channel.
    """

    def write(**metadata):
        constants = {
            "boxes": np.float32(BOXES),
            "classes": np.int64([1, 0, 0]),
            "deviations": np.float32([[1, 2, 3, 4]] * 3),
            "rest": np.float32([0.5, 0.4]),
            "most": np.float32([255]),
            "zero": np.int64(0),
        }
        nodes = [
            helper.make_node("Gather", ["image", "zero"], ["channel"], axis=0),
            helper.make_node("Cast", ["channel"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float"], ["mean"], keepdims=0),
            helper.make_node("Div", ["mean", "most"], ["first"]),
            helper.make_node("Concat", ["first", "rest"], ["scores"], axis=0),
        ]
        for name in ("boxes", "classes", "deviations"):
            nodes.append(helper.make_node("Identity", [f"{name}_"], [name]))
            constants[f"{name}_"] = constants.pop(name)
        kinds = {"boxes": (TensorProto.FLOAT, ["n", 4]), "scores": (TensorProto.FLOAT, ["n"])}
        kinds |= {"classes": (TensorProto.INT64, ["n"])}
        kinds |= {"deviations": (TensorProto.FLOAT, ["n", 4])}
        graph = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, [3, "height", "width"])],
            [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        known = {**METADATA, **metadata}
        helper.set_model_props(model, {k: v for k, v in known.items() if v is not None})
        onnx.checker.check_model(model)
        onnx.save(model, tmp_path / "model.onnx")
        return str(tmp_path / "model.onnx")

    return write


@pytest.fixture
def detector(write_model):
    return Detector(write_model())


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_size, max_size", [(100, 150), (64, 1333), (800, 1333), (0, 10)])
def test_images_are_resized_as_detectron2_does(write_model, min_size, max_size):
    T = pytest.importorskip("detectron2.data.transforms")
    detector = Detector(write_model(min_size=str(min_size), max_size=str(max_size)))
    theirs = T.ResizeShortestEdge([min_size, min_size], max_size)
    rng = np.random.default_rng(0)
    for height, width in [(40, 60), (61, 33), (1, 1), (37, 37), *rng.integers(1, 400, (30, 2))]:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        transform = theirs.get_transform(image)
        if min(getattr(transform, "new_h", 1), getattr(transform, "new_w", 1)) < 1:
            continue
        expected = transform.apply_image(image)
        assert np.array_equal(np.asarray(detector._resized(Image.fromarray(image))), expected)
    assert min(detector._resized(Image.new("RGB", (30000, 2))).size) >= 1


def save(path, array=None, image=None, **options):
    (Image.fromarray(array) if image is None else image).save(path, **options)
    return str(path)


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def test_images_are_read_as_this_project_does(tmp_path):
    """Or refused as it does."""
    pytest.importorskip("detectron2")
    from cbbl_d2.errors import UserError
    from cbbl_d2.inference.frames import read_rgb

    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    gray, deep = color[:, :, 0], rng.integers(0, 65536, (20, 30)).astype(np.uint16)
    files = [save(tmp_path / f"{i}.jpg", color, exif=turned(i)) for i in range(1, 9)]
    files += [
        save(tmp_path / "gray.png", gray),
        save(tmp_path / "alpha.png", np.dstack([color, gray])),
        save(tmp_path / "palette.png", image=Image.fromarray(color).quantize(16)),
        save(tmp_path / "cmyk.jpg", image=Image.fromarray(color).convert("CMYK")),
        save(tmp_path / "one_bit.png", image=Image.fromarray(gray).convert("1")),
        save(tmp_path / "deep.png", deep),
        save(tmp_path / "deep_small.png", deep // 256),
        save(tmp_path / "float.tif", gray.astype(np.float32)),
        save(tmp_path / "share.tif", (gray / 255).astype(np.float32)),
        save(tmp_path / "negative.tif", gray.astype(np.float32) - 100),
    ]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:200])
    (tmp_path / "a folder.png").mkdir()
    names = ("text.png", "cut.png", "a folder.png", "nowhere.png")
    refused = 0
    for file in [*files, *(str(tmp_path / x) for x in names)]:
        try:
            expected = read_rgb(file, {})
        except UserError:
            with pytest.raises(OnnxError) as e:
                read_image(file)
            assert str(e.value).startswith(f"{file}: ") and "\n" not in str(e.value)
            refused += 1
        else:
            assert np.array_equal(np.asarray(read_image(file)), expected), file
    assert refused == 7


def test_every_kind_of_image(detector, tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    path = save(tmp_path / "x.png", color)
    found = [detector(x).scores.tolist() for x in (path, Path(path), Image.fromarray(color), color)]
    assert found[0] == found[1] == found[2] == found[3]
    assert len(detector(color[:, :, 0])) == len(detector(np.dstack([color, color[:, :, :1]]))) == 2
    for wrong in (color.astype(np.float32), color[None], color[:, :, :2], color[:0], color / 255):
        with pytest.raises(OnnxError, match="must be uint8"):
            detector(wrong)


# -- what is found ---------------------------------------------------------------------------------


def test_boxes_are_in_pixels_of_the_image(detector):
    image = np.zeros((200, 250, 3), np.uint8)  # resized to half of it
    image[:, :, 2] = 255
    found = detector(image)
    # The last box has no area within the image. BGR: the first channel is blue.
    assert found.boxes.tolist() == [[20, 40, 60, 120], [0, 180, 250, 190]]
    assert found.boxes.dtype == np.float32
    assert found.deviations.tolist() == [[2, 4, 6, 8]] * 2
    assert found.scores.tolist() == pytest.approx([1, 0.5]) and found.names == ["b", "a"]
    assert found.classes.tolist() == [1, 0] and found.masks is None
    assert json.loads(json.dumps(found.to_dicts()))[0] == {
        "name": "b",
        "class": 1,
        "score": 1.0,
        "box": [20, 40, 60, 120],
        "deviations": [2, 4, 6, 8],
    }
    assert detector(image, score_threshold=0.6).names == ["b"]
    assert len(detector(image, score_threshold=1.1)) == 0


def test_the_order_of_the_channels(write_model):
    image = np.zeros((50, 50, 3), np.uint8)
    image[:, :, 0] = 255
    for format, score in (("BGR", 0.0), ("RGB", 1.0)):
        assert Detector(write_model(input_format=format))(image).scores[0] == pytest.approx(score)


def test_what_the_file_says(detector):
    assert detector.class_names == ["a", "b"] and detector.category_ids == [3, 7]
    assert (detector.min_size, detector.max_size) == (100, 150)
    assert (detector.score_threshold, detector.nms_threshold) == (0.05, 0.5)
    assert detector.max_detections == 100 and not detector.has_masks


def test_a_file_that_is_no_detector(write_model, tmp_path):
    with pytest.raises(OnnxError, match="nowhere.onnx: no such file"):
        Detector(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(OnnxError, match="text.onnx"):
        Detector(tmp_path / "text.onnx")
    with pytest.raises(OnnxError, match="not a detector of tools/export_model.py.*class_names"):
        Detector(write_model(class_names=None))
    with pytest.raises(OnnxError, match="not a detector of tools/export_model.py.*'L'"):
        Detector(write_model(input_format="L"))


# -- the command line ------------------------------------------------------------------------------


def test_the_command(write_model, tmp_path, capsys):
    color = np.full((200, 250, 3), 255, np.uint8)
    path, model = save(tmp_path / "x.png", color), write_model()
    with pytest.raises(SystemExit) as e:
        cbbl_onnx.main([model, path, "--pictures", str(tmp_path / "drawn")])
    assert not e.value.code
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 2 objects",
        "  b 1.000  20.0 40.0 60.0 120.0  +- 2.0 4.0 6.0 8.0",
        "  a 0.500  0.0 180.0 250.0 190.0  +- 2.0 4.0 6.0 8.0",
    ]
    with Image.open(tmp_path / "drawn" / "x.png") as drawn:
        assert drawn.size == (250, 200) and drawn.getpixel((20, 80)) == (255, 0, 0)

    with pytest.raises(SystemExit) as e:
        cbbl_onnx.main(
            [model, str(tmp_path / "no.png"), path, "--json", "--score-threshold", "0.7"]
        )
    assert e.value.code
    out, err = capsys.readouterr()
    assert err == f"skipped: {tmp_path / 'no.png'}: No such file or directory\n"
    assert [x["name"] for x in json.loads(out)["detections"]] == ["b"]

    with pytest.raises(SystemExit) as e:
        cbbl_onnx.main([str(tmp_path / "no.onnx"), path])
    assert str(e.value.code).startswith("error: ")


def test_it_needs_onnxruntime_numpy_and_pillow_alone():
    tree = ast.parse(Path(cbbl_onnx.__file__).read_text("utf-8"))
    names = {x.name for n in ast.walk(tree) if isinstance(n, ast.Import) for x in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"numpy", "onnxruntime", "PIL"}


@pytest.mark.parametrize("targets", ("the folder of the image", "two of one name", "a file"))
def test_pictures_take_no_file_s_place(write_model, tmp_path, targets):
    color = np.full((20, 25, 3), 255, np.uint8)
    paths = [save(tmp_path / "x.png", color)]
    folder = tmp_path / "drawn"
    if targets == "two of one name":
        (tmp_path / "other").mkdir()
        paths.append(save(tmp_path / "other" / "x.png", color))
    elif targets == "a file":
        folder.write_text("")
    else:
        folder = tmp_path
    before = [Path(x).read_bytes() for x in paths]
    with pytest.raises(SystemExit) as e:
        cbbl_onnx.main([write_model(), *paths, "--pictures", str(folder)])
    assert str(e.value.code).startswith("error: ") and "x.png" in e.value.code
    assert [Path(x).read_bytes() for x in paths] == before
    assert not (tmp_path / "drawn").is_dir()


def test_an_image_without_pixels(write_model):
    with pytest.raises(OnnxError, match="an image of 0x5 pixels"):
        Detector(write_model())(Image.new("RGB", (0, 5)))
