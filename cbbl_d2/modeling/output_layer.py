"""The layer that predicts distributions in the place of one that predicts offsets."""

from cbbl_d2.distribution import gaussian_logits
from torch import nn

from .logits_on_demand import ConvOnDemand


def distribution_layer(
    layer: nn.Module,
    transform,
    *,
    weight_std: float,
    init_std: float = 0.0,
    on_demand: bool = False,
) -> nn.Module:
    """
    A new layer with G outputs, the logits of the grid points, where ``layer`` has one, an offset.
    The G logits of a coordinate are adjacent.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``, the last one of a box regression branch.
        transform: a C-BBL transform: holds the grid, from here on as the buffer of the new layer.
        weight_std: standard deviation of the initial weights; that of the stock layer, so that
            both start alike.
        init_std: width of the distribution that the untrained layer predicts, see
            :func:`cbbl_d2.distribution.gaussian_logits`; 0: the uniform distribution.
        on_demand: of a convolution, whether it is a :class:`ConvOnDemand`.

    Raises:
        TypeError: another kind of layer.
    """
    grid, num_points = transform.grid, transform.num_points
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features * num_points)
    elif isinstance(layer, nn.Conv2d):
        window = layer.kernel_size, layer.stride, layer.padding
        kind = ConvOnDemand if on_demand else nn.Conv2d
        new = kind(layer.in_channels, layer.out_channels * num_points, *window)
        new.num_anchors = layer.out_channels // 4
    else:
        raise TypeError(f"cannot put a distribution in the place of {type(layer).__name__}")
    # Persistent: in a checkpoint it tells weights for this grid from those for another one, or for
    # offsets, whose shape may be the same.
    new.register_buffer("grid", grid.clone())
    nn.init.normal_(new.weight, std=weight_std)
    nn.init.constant_(new.bias, 0)
    if init_std > 0:
        new.bias.data.view(-1, num_points).copy_(gaussian_logits(grid, init_std))
    transform.refer_to(new)
    return new
