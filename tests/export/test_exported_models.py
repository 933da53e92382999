import contextlib
import sys

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.export import (  # noqa: E402
    compare,
    detect,
    load_onnx,
    load_torchscript,
    output_names,
    to_onnx,
    to_torchscript,
)
from cbbl_d2.modeling import logits_on_demand  # noqa: E402

from tests.export.models import busy_model, images, needs_export  # noqa: E402
from tests.modeling.detectors import DETECTORS, set_score_threshold  # noqa: E402

pytestmark = [needs_export, pytest.mark.filterwarnings("ignore")]
slow = pytest.mark.slow
# `make test` exports one detector of each family as ONNX, and one as TorchScript.
IN_SHORT = {
    ("onnx", x) for x in ("faster", "cascade", "rpn_and_faster", "retinanet", "fcos", "mask")
} | {("torchscript", "faster")}
CASES = [
    pytest.param(format, name, marks=[] if (format, name) in IN_SHORT else slow)
    for format in ("onnx", "torchscript")
    for name in DETECTORS
    if (format, name) != ("onnx", "keypoint")
]


def export(format, model, image):
    """The exported model as a function from an image to tensors."""
    if format == "onnx":
        return load_onnx(to_onnx(model, image, {}))
    return load_torchscript(to_torchscript(model, image), torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_optimizing():
    with torch.no_grad(), torch.jit.optimized_execution(False):  # it takes seconds
        yield


@pytest.mark.parametrize("format, name", CASES)
def test_the_exported_model_finds_what_the_original_finds(format, name):
    model, examples = busy_model(name), images()
    exported = export(format, model, examples[0])
    has_deviations = name != "rpn"  # its boxes are of Detectron2's own head
    expected_names = ["boxes", "scores", "classes"]
    expected_names += ["masks"] * (name == "mask") + ["keypoints"] * (name == "keypoint")
    expected_names += ["deviations"] * has_deviations
    assert output_names(model, examples[0]) == expected_names
    check_equal(model, exported, examples)


def check_equal(model, exported, examples):
    num_objects = 0
    for image in examples:
        expected, found = detect(model, image), exported(image)
        # Otherwise their order, and what NMS chooses, would be arbitrary.
        assert expected["scores"].unique().numel() == len(expected["scores"])
        for a, (field, b) in zip(found, expected.items(), strict=True):
            assert a.dtype == b.dtype
            assert torch.allclose(a, b, rtol=0, atol=1e-4 if field == "scores" else 1e-3)
        num_objects += len(expected["scores"])
    assert num_objects > 40
    assert compare(model, exported, examples).num_objects == num_objects


@pytest.mark.parametrize("format", ["onnx", pytest.param("torchscript", marks=slow)])
@pytest.mark.parametrize("name", ["faster", pytest.param("faster_class_specific", marks=slow)])
def test_a_box_head_that_is_applied_twice(format, name):
    model, examples = busy_model(name), images()
    before = detect(model, examples[1])["pred_boxes"]
    model.roi_heads.box_iterations = 2
    after = detect(model, examples[1])["pred_boxes"]
    assert before.shape != after.shape or not torch.allclose(before, after, atol=1)
    check_equal(model, export(format, model, examples[0]), examples)


@pytest.mark.parametrize("name", ["faster", pytest.param("cascade", marks=slow), "fcos"])
def test_deviations_are_in_pixels(name):
    model, (image, *_) = busy_model(name), images()
    result = model([{"image": image}])[0]["instances"]
    found = detect(model, image)
    boxes = result.pred_boxes.tensor
    expected = result.pred_boxes_std * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    assert len(boxes) > 5
    torch.testing.assert_close(found["pred_boxes_std"], expected)


@slow
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_any_number_of_proposals(format):
    """Not only as many as the image had that was traced."""
    model, examples = busy_model("faster_class_specific"), images()
    model.proposal_generator.post_nms_topk[False] = 10000  # never reached
    exported = export(format, model, examples[0])
    for image in examples:
        expected, found = detect(model, image), exported(image)
        assert len(expected["scores"]) > 5
        assert torch.allclose(found[0], expected["pred_boxes"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "format, name",
    [
        ("onnx", "faster"),
        *(
            pytest.param("onnx", x, marks=slow)
            for x in ("faster_class_specific", "cascade", "retinanet", "fcos", "mask")
        ),
        pytest.param("torchscript", "mask", marks=slow),
    ],
)
def test_a_model_that_finds_nothing_in_the_traced_image(format, name):
    """The way through the code is that of the traced image; it must lead to objects as well."""
    model = busy_model(name)
    candidates = [*images(), torch.zeros(3, 96, 128), torch.full((3, 96, 128), 255.0)]
    set_score_threshold(model, 0.0)
    highest = {i: detect(model, x)["scores"].max().item() for i, x in enumerate(candidates)}
    nothing = candidates[min(highest, key=highest.get)]
    image = max(images(), key=lambda x: detect(model, x)["scores"].max().item())
    set_score_threshold(model, min(highest.values()) + 1e-4)  # above rounding
    assert len(detect(model, nothing)["scores"]) == 0
    exported = export(format, model, nothing)
    assert compare(model, exported, [nothing]).num_objects == 0
    agreement = compare(model, exported, [image])
    assert agreement.num_objects > 2 and agreement.boxes <= 1e-3 and agreement.scores <= 1e-4


@pytest.mark.parametrize("name", ["retinanet", pytest.param("fcos", marks=slow)])
def test_a_large_level_of_a_dense_detector(name, monkeypatch):
    """Not all of its logits are computed, in one image those of no anchor."""
    monkeypatch.setattr(logits_on_demand, "_LARGE_LEVEL", 100)
    model, examples = busy_model(name), images()
    exported = load_onnx(to_onnx(model, examples[0], {}))
    agreement = compare(model, exported, examples)
    assert agreement.num_objects > 40 and agreement.boxes <= 1e-3
    set_score_threshold(model, 0.99)
    exported = load_onnx(to_onnx(model, examples[0], {}))
    assert compare(model, exported, examples).num_objects == 0


@pytest.mark.parametrize(
    "name", ["faster", *(pytest.param(x, marks=slow) for x in ("retinanet", "fcos", "cascade"))]
)
def test_a_model_that_votes(name):
    model, examples = busy_model(name), images()
    voter = model.roi_heads.box_predictor if hasattr(model, "roi_heads") else model
    if name == "cascade":
        voter = voter[-1]
    voter.box2box_transform._std_scale = (1.5, 1.4, 0.9, 0.8)
    # A level with fewer candidates than this in the image that is traced has no limit afterwards:
    # in one with more, more of them have a say.
    voter.test_topk_candidates = 10000
    without = detect(model, examples[1])["pred_boxes"]
    voter.voting_sigma = 0.05
    assert not torch.equal(detect(model, examples[1])["pred_boxes"], without)
    agreement = compare(model, export("onnx", model, examples[0]), examples)
    assert agreement.num_objects > 40 and agreement.boxes <= 1e-3


def all_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def test_the_onnx_file():
    model, (image, *_) = busy_model("faster"), images()
    file = onnx.load_from_string(to_onnx(model, image, {"class_names": '["a"]', "x": "y"}))
    assert {p.key: p.value for p in file.metadata_props} == {"class_names": '["a"]', "x": "y"}
    (given,) = file.graph.input
    assert given.name == "image"
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sides = given.type.tensor_type.shape.dim
    assert sides[0].dim_value == 3 and [s.dim_param for s in sides[1:]] == ["height", "width"]
    nodes = list(all_nodes(file.graph))
    assert {"NonMaxSuppression", "RoiAlign", "Softmax"} <= {node.op_type for node in nodes}
    assert {node.domain for node in nodes} == {""}  # ONNX's own operators
    # Both networks are in training mode at first: exporting leaves the model as it was.
    assert not model.training and not model.backbone.training


def test_keypoints_are_refused_in_one_line():
    model, (image, *_) = busy_model("keypoint"), images()
    with pytest.raises(UserError, match="KEYPOINT_ON.*--format torchscript"):
        to_onnx(model, image, {})


def test_what_onnx_cannot_say(monkeypatch, capfd):
    model, (image, *_) = busy_model("faster"), images()
    predict = model.roi_heads.box_predictor.predict_probs

    def determinants(predictions, proposals):
        scores = predict(predictions, proposals)
        return [x + 0 * torch.linalg.svd(x[:2, :2]).S.sum() for x in scores]

    monkeypatch.setattr(model.roi_heads.box_predictor, "predict_probs", determinants)
    with pytest.raises(UserError, match="GeneralizedRCNN cannot be exported as ONNX: .*svd"):
        to_onnx(model, image, {})
    assert capfd.readouterr().out == ""  # torch's exporter prints the whole graph


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing(package, monkeypatch):
    model, (image, *_) = busy_model("faster"), images()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{package} is not installed: pip install -e"):
        with contextlib.nullcontext(to_onnx(model, image, {}) if package == "onnx" else b""):
            load_onnx(b"")
