import copy
import os

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from cbbl_d2.engine import CBBLCheckpointer, load_config
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.modeling import TorchvisionNetwork
from cbbl_d2.modeling.torchvision_backbone import TorchvisionWeightsHandler, pretrained_input

# Network -> the nodes of torchvision's that are its feature maps, from stride 4 on, and its stem
NETWORKS = {
    "mobilenet_v2": ("features.3", "features.6", "features.13", "features.17"),
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "efficientnet_b0": ("features.2", "features.3", "features.5", "features.7"),
    "convnext_tiny": ("features.1", "features.3", "features.5", "features.7"),
    "regnet_y_400mf": tuple(f"trunk_output.block{i}" for i in range(1, 5)),
}
LEVELS = ("c2", "c3", "c4", "c5")


def with_statistics(network, seed=0):
    """Torchvision's own, with BatchNorm as after a training."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(network, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def same_weights(network, **kwargs):
    """Torchvision's network, its feature maps, and ours with equal weights."""
    model = with_statistics(network)
    nodes = dict(zip(NETWORKS[network], LEVELS))
    reference = create_feature_extractor(model, nodes, suppress_diff_warning=True).eval()
    ours = TorchvisionNetwork(network, **kwargs).eval()
    weights = {k: v for k, v in model.state_dict().items() if k in ours.body.state_dict()}
    assert not ours.body.load_state_dict(weights, strict=False).missing_keys
    return model, reference, ours


@pytest.fixture
def detector_cfg(repository):
    def load(name="cbbl", *opts):
        path = os.path.join(repository, "configs", "HIT-UAV", f"{name}.yaml")
        cfg = load_config(path, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
        return cfg

    return load


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("network", NETWORKS)
def test_features_and_gradients_are_those_of_torchvision(network, norm):
    model, reference, ours = same_weights(network, norm=norm)
    images = torch.randn(2, 3, 64, 96)
    expected, found = reference(images), ours(images)
    assert list(found) == list(LEVELS)
    for name in LEVELS:
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=1e-5)
        channels, stride = ours.output_shape()[name].channels, ours.output_shape()[name].stride
        assert found[name].shape == (2, channels, 64 // stride, 96 // stride)
    sum(x.square().mean() for x in expected.values()).backward()
    sum(x.square().mean() for x in found.values()).backward()
    of_reference = dict(model.named_parameters())
    compared = 0
    for name, parameter in ours.body.named_parameters():
        if parameter.grad is not None and name.endswith("weight") and parameter.dim() == 4:
            other = of_reference[name].grad
            error = (parameter.grad - other).norm() / other.norm().clamp(min=1e-12)
            assert error < 1e-3, name
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("network", NETWORKS)
def test_strides_of_the_pyramid(detector_cfg, network):
    cfg = detector_cfg("cbbl", "MODEL.TORCHVISION.NETWORK", network)
    backbone = build_backbone(cfg)
    features = backbone(torch.zeros(1, 3, 64, 64))
    assert {k: v.shape[1:] for k, v in features.items()} == {
        f"p{i}": (64, 64 // 2**i, 64 // 2**i) for i in range(2, 7)
    }
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize("levels, expected", [("c1", "p1"), ("c2", "p2")])
def test_finer_and_fewer_levels(detector_cfg, levels, expected):
    names = [f"c{i}" for i in range(int(levels[1]), 5)]  # up to stride 16
    cfg = detector_cfg("cbbl", "MODEL.FPN.IN_FEATURES", names)
    features = build_backbone(cfg)(torch.zeros(1, 3, 64, 64))
    assert list(features)[0] == expected and list(features)[-1] == "p5"
    assert features["p5"].shape[-1] == 2


@pytest.mark.parametrize(
    "builder", ["build_retinanet_torchvision_fpn_backbone", "build_torchvision_fpn_p5_backbone"]
)
def test_two_more_levels_for_dense_detectors(detector_cfg, builder):
    cfg = detector_cfg("cbbl", "MODEL.BACKBONE.NAME", builder)
    backbone = build_backbone(cfg)
    features = backbone(torch.zeros(1, 3, 128, 128))
    assert list(features) == [f"p{i}" for i in range(2, 8)]
    assert features["p7"].shape[-1] == 1
    channels = 320 if "retinanet" in builder else 64
    assert backbone.top_block.p6.in_channels == channels


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def train_a_step(network):
    network.train()
    before = state(network)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    sum(x.square().mean() for x in network(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    after = state(network)
    return {k for k in before if not torch.equal(before[k], after[k])}


def test_what_is_frozen_does_not_move():
    _, _, network = same_weights("mobilenet_v2", freeze_at=2)
    moved = train_a_step(network)
    block = lambda name: int(name.split(".")[2])  # noqa: E731  body.features.N
    assert moved and min(map(block, moved)) == 4  # the first block of stride 8
    # With frozen BatchNorm only convolutions learn: no statistics, no scales.
    names = dict(network.named_modules())
    assert not any(isinstance(names[k.rpartition(".")[0]], FrozenBatchNorm2d) for k in moved)


def test_live_batch_norm_moves_outside_of_the_frozen_part_alone():
    _, _, network = same_weights("resnet18", norm="BN", freeze_at=2)
    moved = train_a_step(network)
    assert "body.layer2.0.bn1.running_mean" in moved and "body.layer2.0.bn1.weight" in moved
    assert not any(k.startswith(("body.conv1", "body.bn1", "body.layer1")) for k in moved)


def test_everything_learns_where_nothing_is_frozen():
    _, _, network = same_weights("resnet18")
    assert "body.conv1.weight" in train_a_step(network)
    assert all(p.requires_grad for p in network.parameters())


def test_sync_batch_norm():
    network = TorchvisionNetwork("resnet18", norm="SyncBN", freeze_at=2)
    layers = dict(network.body.named_modules())
    assert isinstance(layers["layer3.0.bn1"], nn.SyncBatchNorm)
    assert isinstance(layers["layer1.0.bn1"], FrozenBatchNorm2d)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_copy_computes_the_same(norm):
    _, _, network = same_weights("efficientnet_b0", norm=norm)
    again = copy.deepcopy(network)
    images = torch.randn(1, 3, 64, 64)
    for name, feature in network(images).items():
        torch.testing.assert_close(again(images)[name], feature, rtol=0, atol=0)
    with torch.no_grad():
        next(iter(again.parameters())).add_(1.0)
    assert not torch.equal(again(images)["c5"], network(images)["c5"])


def test_building_draws_no_more_numbers_than_torchvision():
    """So that the rest of a detector starts as it did before."""
    torch.manual_seed(0)
    torchvision.models.mobilenet_v2(weights=None)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TorchvisionNetwork("mobilenet_v2", freeze_at=2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": "resnet"}, "MODEL.TORCHVISION.NETWORK = 'resnet'"),
        ({"network": "fasterrcnn_resnet50_fpn"}, "MODEL.TORCHVISION.NETWORK"),
        ({"norm": "GN"}, "MODEL.TORCHVISION.NORM = 'GN': must be one of FrozenBN, BN, SyncBN"),
        ({"freeze_at": 6}, "MODEL.BACKBONE.FREEZE_AT = 6"),
        ({"out_features": ["res2"]}, r"MODEL.FPN.IN_FEATURES = \['res2'\].* c1, c2, c3, c4, c5"),
        ({"network": "convnext_tiny", "out_features": ["c1", "c2"]}, "which has c2, c3, c4, c5"),
        ({"network": "vit_b_16"}, "which has none"),
    ],
)
def test_what_cannot_be_built_is_named(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        TorchvisionNetwork(**{"network": "mobilenet_v2", **changes})
    assert "\n" not in str(error.value)


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture
def weights_file(tmp_path):
    path = str(tmp_path / "mobilenet_v2.pth")
    torch.save(with_statistics("mobilenet_v2", seed=5).state_dict(), path)
    return path


def load_into(cfg, path):
    model = build_model(cfg)
    CBBLCheckpointer(model).load(path)
    return model


def test_weights_of_torchvision_become_those_of_the_backbone(detector_cfg, weights_file):
    model = load_into(detector_cfg(), weights_file)
    saved = torch.load(weights_file, weights_only=True)
    body = model.backbone.bottom_up.body.state_dict()
    assert all(torch.equal(body[name], saved[name]) for name in body)


@pytest.mark.parametrize("name", ["cbbl_retinanet", "cbbl_fcos", "cbbl_cascade_rcnn"])
def test_of_every_detector(detector_cfg, weights_file, name):
    model = load_into(detector_cfg(name), weights_file)
    saved = torch.load(weights_file, weights_only=True)
    body = model.backbone.bottom_up.body.state_dict()
    assert torch.equal(body["features.0.0.weight"], saved["features.0.0.weight"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
    ],
)
def test_images_unlike_those_of_the_pretraining_are_refused(
    detector_cfg, weights_file, key, value, tmp_path
):
    right = pretrained_input("mobilenet_v2")[key]
    cfg = detector_cfg("cbbl", key, value)
    with pytest.raises(ConfigError) as error:
        load_into(cfg, weights_file)
    assert f"{key} = {value}" in str(error.value) and f"need {key} {right}" in str(error.value)
    # A detector that was trained so from the beginning knows no other images.
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    load_into(cfg, str(tmp_path / "model.pth"))


def test_our_configs_hold_the_right_values(detector_cfg):
    cfg = detector_cfg()
    assert pretrained_input("mobilenet_v2") == {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": cfg.MODEL.PIXEL_MEAN,
        "MODEL.PIXEL_STD": cfg.MODEL.PIXEL_STD,
    }
    assert pretrained_input("efficientnet_v2_l")["MODEL.PIXEL_MEAN"] == [127.5] * 3


def test_weights_of_another_network_are_refused(detector_cfg, weights_file):
    cfg = detector_cfg("cbbl", "MODEL.TORCHVISION.NETWORK", "resnet18")
    with pytest.raises(UserError, match="not weights of torchvision's resnet18") as error:
        load_into(cfg, weights_file)
    assert weights_file in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_predicts_as_before(detector_cfg, weights_file, tmp_path):
    cfg = detector_cfg("cbbl", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    model = load_into(cfg, weights_file).eval()
    CBBLCheckpointer(model, str(tmp_path)).save("model")
    again = build_model(cfg).eval()
    CBBLCheckpointer(again, require_all=True).load(str(tmp_path / "model.pth"))
    image = [{"image": torch.randint(0, 255, (3, 96, 96)).float()}]
    with torch.no_grad():
        a, b = model(image)[0]["instances"], again(image)[0]["instances"]
    assert len(a) > 0 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


class _AsTuple(nn.Module):
    """TorchScript's tracing does not take dicts."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return tuple(self.network(images).values())


@pytest.mark.filterwarnings("ignore")
def test_traced_features_are_equal():
    _, _, network = same_weights("mobilenet_v2")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(_AsTuple(network).eval(), torch.randn(1, 3, 96, 64))
        for a, b in zip(traced(images), network(images).values()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def handler(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return TorchvisionWeightsHandler()._get_local_path


def test_weights_are_downloaded_once(handler, monkeypatch):
    asked = []

    def download(url, file, **kwargs):
        asked.append(url)
        open(file, "w").close()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = handler("torchvision://mobilenet_v2/IMAGENET1K_V1")
    assert path == handler("torchvision://mobilenet_v2/IMAGENET1K_V1") and os.path.isfile(path)
    assert handler("torchvision://mobilenet_v2") != path  # the best ones
    weights = torchvision.models.MobileNet_V2_Weights
    assert asked == [weights.IMAGENET1K_V1.url, weights.IMAGENET1K_V2.url]


@pytest.mark.parametrize(
    "path, message",
    [
        ("torchvision://mobilenet_v9", "has no network mobilenet_v9"),
        ("torchvision://mobilenet_v2/IMAGENET", "but IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_unknown_weights_are_named(handler, path, message):
    with pytest.raises(UserError, match=message):
        handler(path)


def test_a_failed_download_says_what_else_to_do(handler, monkeypatch):
    def fail(url, file, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match="no route to host.*tools/download_mobilenet.py") as error:
        handler("torchvision://mobilenet_v2")
    assert "\n" not in str(error.value)
