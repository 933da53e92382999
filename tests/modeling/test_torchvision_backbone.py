import copy
import os

import pytest
import torch
import torchvision
from cbbl_d2.engine import CBBLCheckpointer, load_config
from cbbl_d2.engine.optimizer import build_optimizer
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.modeling import TorchvisionNetwork
from cbbl_d2.modeling.torchvision_backbone import TorchvisionWeightsHandler, pretrained_input
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

# Network -> the nodes of torchvision's that are its feature maps, from stride 4 on, and its stem
NETWORKS = {
    "mobilenet_v2": ("features.3", "features.6", "features.13", "features.17"),
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "efficientnet_b0": ("features.2", "features.3", "features.5", "features.7"),
    "convnext_tiny": ("features.1", "features.3", "features.5", "features.7"),
    "regnet_y_400mf": tuple(f"trunk_output.block{i}" for i in range(1, 5)),
}
# For laws that are the same for each.
SOME_NETWORKS = [
    n if n in ("mobilenet_v2", "resnet18") else pytest.param(n, marks=pytest.mark.slow)
    for n in NETWORKS
]
LEVELS = ("c2", "c3", "c4", "c5")
# Of "c1" to "c5"; ConvNeXt begins at stride 4
CHANNELS = {
    "mobilenet_v2": (16, 24, 32, 96, 320),
    "resnet18": (64, 64, 128, 256, 512),
    "efficientnet_b0": (16, 24, 40, 112, 320),
    "convnext_tiny": (None, 96, 192, 384, 768),
    "regnet_y_400mf": (32, 48, 104, 208, 440),
}
# The parts up to the feature map "c2"
UP_TO_STRIDE_4 = {
    "mobilenet_v2": tuple(f"features.{i}." for i in range(4)),
    "resnet18": ("conv1.", "bn1.", "layer1."),
    "efficientnet_b0": tuple(f"features.{i}." for i in range(3)),
    "convnext_tiny": ("features.0.", "features.1."),
    "regnet_y_400mf": ("stem.", "trunk_output.block1."),
}


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


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("network", ["mobilenet_v2", "regnet_y_400mf", "mobilenet_v3_large"])
def test_all_gradients_in_double_precision(network, norm):
    """Scales, biases and the gates of squeeze-and-excitation, too; the last network has an eps of
    its own in BatchNorm."""
    model = with_statistics(network).double()
    ours = TorchvisionNetwork(network, norm=norm).double().eval()
    ours.body.load_state_dict(model.state_dict(), strict=False)
    nodes = NETWORKS.get(network, ("features.3", "features.6", "features.12", "features.15"))
    reference = create_feature_extractor(model, dict(zip(nodes, LEVELS))).eval()
    images = torch.randn(2, 3, 64, 64).double()
    expected, found = reference(images), ours(images)
    for name in LEVELS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    weights = {name: torch.randn_like(feature) for name, feature in expected.items()}
    for features in (expected, found):
        sum((weights[name] * features[name]).sum() for name in LEVELS).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if norm == "FrozenBN":
        layers = dict(model.named_modules())
        gradients = {
            name: gradient
            for name, gradient in gradients.items()
            if not isinstance(layers[name.rpartition(".")[0]], nn.BatchNorm2d)
        }
    assert set(gradients) == {name for name, _ in ours.body.named_parameters()}
    for name, parameter in ours.body.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert error < 1e-9, name


@pytest.mark.parametrize(
    "network, first", [(n, i) for n in NETWORKS for i in (1, 2) if CHANNELS[n][i - 1]]
)
def test_levels_of_the_pyramid(detector_cfg, network, first):
    """P1 as well, where the network has features of stride 2."""
    names = [f"c{i}" for i in range(first, 6)]
    opts = ["MODEL.TORCHVISION.NETWORK", network, "MODEL.FPN.IN_FEATURES", names]
    backbone = build_backbone(detector_cfg("cbbl", *opts))
    found = {k: (s.stride, s.channels) for k, s in backbone.bottom_up.output_shape().items()}
    assert found == {f"c{i}": (2**i, CHANNELS[network][i - 1]) for i in range(first, 6)}
    features = backbone(torch.zeros(2, 3, 64, 128))
    assert {k: v.shape[1:] for k, v in features.items()} == {
        f"p{i}": (64, 64 // 2**i, 128 // 2**i) for i in range(first, 7)
    }
    assert {k: s.stride for k, s in backbone.output_shape().items()} == {
        f"p{i}": 2**i for i in range(first, 7)
    }
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize(
    "builder, last",
    [
        ("build_torchvision_fpn_backbone", 5),
        ("build_retinanet_torchvision_fpn_backbone", 6),
        ("build_torchvision_fpn_p5_backbone", 6),
    ],
)
@pytest.mark.parametrize("first", [1, 2])
def test_the_pyramid_may_end_before_stride_32(detector_cfg, builder, last, first):
    names = [f"c{i}" for i in range(first, 5)]
    opts = ["MODEL.BACKBONE.NAME", builder, "MODEL.FPN.IN_FEATURES", names]
    backbone = build_backbone(detector_cfg("cbbl", *opts))
    features = backbone(torch.zeros(1, 3, 64, 64))
    assert {k: v.shape[-1] for k, v in features.items()} == {
        f"p{i}": 64 // 2**i for i in range(first, last + 1)
    }
    # Nothing is kept that leads to no level.
    blocks = {int(k.split(".")[2]) for k in backbone.bottom_up.state_dict() if "features" in k}
    assert max(blocks) == 13


@pytest.mark.parametrize(
    "builder, source, channels",
    [
        ("build_retinanet_torchvision_fpn_backbone", "c5", 320),
        ("build_torchvision_fpn_p5_backbone", "p5", 64),
    ],
)
def test_two_more_levels_for_dense_detectors(detector_cfg, builder, source, channels):
    backbone = build_backbone(detector_cfg("cbbl", "MODEL.BACKBONE.NAME", builder)).eval()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        features = backbone(images)
        before = {**backbone.bottom_up(images), **features}[source]
        assert before.shape[1] == channels
        p6 = backbone.top_block.p6(before)
        assert torch.equal(features["p6"], p6)
        assert torch.equal(features["p7"], backbone.top_block.p7(p6.relu()))
    assert list(features) == [f"p{i}" for i in range(2, 8)]
    assert features["p7"].shape[-1] == 1


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


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("network", SOME_NETWORKS)
def test_a_step_moves_all_but_what_is_frozen(detector_cfg, network, norm):
    """Statistics and counters of BatchNorm included, with the optimizer of a training."""
    cfg = detector_cfg("cbbl", "MODEL.TORCHVISION.NETWORK", network, "MODEL.TORCHVISION.NORM", norm)
    torch.manual_seed(0)
    backbone = build_backbone(cfg).train()
    body = backbone.bottom_up.body
    body.load_state_dict(with_statistics(network).state_dict(), strict=False)
    before = state(body)
    optimizer = build_optimizer(cfg, backbone)
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    norms = {k for k, m in body.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    for name, value in body.state_dict().items():
        frozen = name.startswith(UP_TO_STRIDE_4[network]) or name.rpartition(".")[0] in norms
        assert torch.equal(value, before[name]) == frozen, name
    live = {k for k, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert bool(live) == (norm == "BN" and network != "convnext_tiny")
    assert not any(f"{name}.".startswith(UP_TO_STRIDE_4[network]) for name in live)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("levels", [("c2",), LEVELS])
def test_everything_can_be_frozen(levels, norm):
    """Also where the frozen part goes on after the last feature map that is used."""
    network = TorchvisionNetwork("mobilenet_v2", levels, norm=norm, freeze_at=5)
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


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


@pytest.mark.parametrize("network", SOME_NETWORKS)
def test_a_state_goes_into_another_network(network):
    _, _, ours = same_weights(network)
    again = TorchvisionNetwork(network).eval()
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(again(images)["c5"], ours(images)["c5"])
    again.load_state_dict(ours.state_dict())
    assert all(torch.equal(again(images)[k], v) for k, v in ours(images).items())
    # Each has its own numbers, those that convolutions took over from BatchNorm included.
    before = ours(images)
    for value in again.state_dict().values():
        value.zero_()
    assert not any(feature.any() for feature in again(images).values())
    assert all(torch.equal(ours(images)[k], v) for k, v in before.items())


@pytest.mark.parametrize("network", SOME_NETWORKS)
def test_building_draws_no_more_numbers_than_torchvision(network):
    """So that the rest of a detector starts as it did before."""
    torch.manual_seed(0)
    parameters = dict(torchvision.models.get_model(network, weights=None).named_parameters())
    expected = torch.rand(1)
    torch.manual_seed(0)
    ours = TorchvisionNetwork(network, freeze_at=2)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(p, parameters[name]) for name, p in ours.body.named_parameters())
    assert all(module.training for module in ours.modules())  # as every new module


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": "resnet"}, "MODEL.TORCHVISION.NETWORK = 'resnet'"),
        ({"network": "fasterrcnn_resnet50_fpn"}, "MODEL.TORCHVISION.NETWORK"),
        ({"norm": "GN"}, "MODEL.TORCHVISION.NORM = 'GN': must be one of FrozenBN, BN, SyncBN"),
        ({"freeze_at": 6}, "MODEL.BACKBONE.FREEZE_AT = 6"),
        ({"freeze_at": -1}, "MODEL.BACKBONE.FREEZE_AT = -1"),
        ({"out_features": ["res2"]}, r"MODEL.FPN.IN_FEATURES = \['res2'\].* c1, c2, c3, c4, c5"),
        ({"network": "convnext_tiny", "out_features": ["c1", "c2"]}, "which has c2, c3, c4, c5"),
        ({"network": "vit_b_16"}, "which has none"),
    ],
)
def test_what_cannot_be_built_is_named(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        TorchvisionNetwork(**{"network": "mobilenet_v2", **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "builder",
    [
        "build_torchvision_fpn_backbone",
        "build_retinanet_torchvision_fpn_backbone",
        "build_torchvision_fpn_p5_backbone",
    ],
)
@pytest.mark.parametrize("levels", [[], ["c2", "c4"], ["c4", "c3"]])
def test_levels_that_make_no_pyramid_are_named(detector_cfg, error_of, builder, levels):
    cfg = detector_cfg("cbbl", "MODEL.BACKBONE.NAME", builder, "MODEL.FPN.IN_FEATURES", levels)
    assert f"MODEL.FPN.IN_FEATURES = {levels}: " in error_of(build_backbone, cfg)


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


def test_weights_of_torchvision_become_those_of_the_backbone(detector_cfg, weights_file, caplog):
    caplog.set_level("INFO")
    model = load_into(detector_cfg(), weights_file)
    (line,) = [r.getMessage() for r in caplog.records if "randomly initialized" in r.getMessage()]
    others = {k.rpartition(".")[0] for k in model.state_dict() if "bottom_up" not in k}
    assert f" {len(others - {''})} of " in line and "bottom_up" not in line
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


def test_weights_of_equal_names_and_other_shapes_are_refused(detector_cfg, tmp_path, error_of):
    path = str(tmp_path / "weights.pth")
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    cfg = detector_cfg("cbbl", "MODEL.TORCHVISION.NETWORK", "resnet50")
    message = error_of(load_into, cfg, path)
    assert f"{path}: not weights of torchvision's resnet50 (MODEL.TORCHVISION.NETWORK)" in message


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
    "path, file",
    [
        ("torchvision://mobilenet_v2", "mobilenet_v2-7ebf99e0.pth"),
        ("torchvision://mobilenet_v2/IMAGENET1K_V1", "mobilenet_v2-b0353104.pth"),
    ],
)
def test_a_detector_takes_weights_from_the_cache(
    detector_cfg, handler, weights_file, monkeypatch, tmp_path, path, file
):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("network"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    saved = torch.load(weights_file, weights_only=True)
    os.rename(weights_file, tmp_path / "hub" / "checkpoints" / file)
    body = load_into(detector_cfg(), path).backbone.bottom_up.body.state_dict()
    assert all(torch.equal(body[name], saved[name]) for name in body)


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


# The hash is part of the file's name; torch.hub keeps no file that has another one.
@pytest.mark.parametrize("cause", [OSError("no route to host"), RuntimeError("wrong hash")])
def test_a_failed_download_says_what_else_to_do(
    detector_cfg, handler, monkeypatch, error_of, cause
):
    def fail(url, file, hash_prefix=None):
        assert url.endswith(f"-{hash_prefix}.pth")
        raise cause

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = error_of(load_into, detector_cfg(), "torchvision://mobilenet_v2")
    for words in (str(cause), handler.__self__.PREFIX, "tools/download_mobilenet.py"):
        assert words in message
