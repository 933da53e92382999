import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.modeling.logits_on_demand import ConvOnDemand, LogitsOnDemand  # noqa: E402
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K  # noqa: E402


@pytest.mark.parametrize("num_anchors", [1, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3)])
def test_logits_are_those_of_the_convolution(num_anchors, kernel):
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    layer = ConvOnDemand(6, num_anchors * 8, kernel, padding=padding).double()
    layer.num_anchors = num_anchors
    features = torch.randn(2, 6, 4, 7, dtype=torch.float64)
    dense = layer(features)
    assert isinstance(dense, torch.Tensor)
    all_logits = permute_to_N_HWA_K(dense, 8)

    lazy = layer.eval()(features)
    torch.testing.assert_close(lazy.dense(), dense)
    assert all_logits.shape[1] == 28 * num_anchors
    for number in (28 * num_anchors, 13, 5, 1):  # most are not few
        anchors = torch.randperm(all_logits.shape[1])[:number]
        for image in range(2):
            torch.testing.assert_close(lazy[image][anchors], all_logits[image][anchors])
            assert lazy[image][anchors[:0]].shape == (0, 8)


def test_gradients_are_those_of_the_convolution():
    torch.manual_seed(0)
    layer = ConvOnDemand(4, 8, 3, padding=1).double()
    layer.num_anchors = 1
    features = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor([0, 14, 7, 7])  # few enough
    logits = permute_to_N_HWA_K(layer(features), 8)[0][anchors]
    expected = torch.autograd.grad(logits.square().sum(), [features, layer.weight, layer.bias])
    logits = layer.eval()(features)[0][anchors]
    found = torch.autograd.grad(logits.square().sum(), [features, layer.weight, layer.bias])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel_size", ((1, 1), (3, 3), (3, 1)))
@pytest.mark.parametrize("num_picked", (0, 20))
def test_anchors_of_several_images_with_their_gradients(kernel_size, num_picked):
    torch.manual_seed(0)
    padding = tuple(size // 2 for size in kernel_size)
    layer = ConvOnDemand(5, 3 * 8, kernel_size, padding=padding).double()
    layer.num_anchors = 3
    features = torch.randn(2, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    image = torch.randint(2, (num_picked,))
    anchor = torch.randint(4 * 7 * 3, (num_picked,))
    anchor[:2] = torch.tensor([0, 4 * 7 * 3 - 1])[:num_picked]  # in two corners
    picked = LogitsOnDemand(layer, features)[image, anchor]
    expected = permute_to_N_HWA_K(layer(features), 8)[image, anchor]
    assert picked.shape == (num_picked, 8)
    assert torch.allclose(picked, expected)
    inputs = (features, layer.weight, layer.bias)
    scale = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad((picked * scale).sum(), inputs),
        torch.autograd.grad((expected * scale).sum(), inputs),
    ):
        assert torch.allclose(got, wanted)
