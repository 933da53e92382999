"""Models with random weights that find something, and images for them."""

import pytest
import torch

from tests.modeling.detectors import build, localization_layers, set_score_threshold

SIZES = ((96, 128), (64, 200), (150, 110))

try:
    from detectron2.export import TracingAdapter
except ImportError as e:
    TracingAdapter = None
    reason = f"this Detectron2 cannot export: detectron2.export: {e}"
else:
    reason = ""

needs_export = pytest.mark.skipif(TracingAdapter is None, reason=reason)


def busy_model(name: str) -> torch.nn.Module:
    """Random weights that find dozens of objects, of scores that differ."""
    model = build(name).eval()
    torch.manual_seed(0)
    for layer in localization_layers(name, model):
        torch.nn.init.normal_(layer.weight, std=0.05)
    for module_name, module in model.named_modules():
        if module_name.endswith("cls_score"):
            torch.nn.init.normal_(module.weight, std=0.03)  # with more, many scores would be 1
    set_score_threshold(model, 0.02 if name == "fcos" else 0.1)
    return model


def images() -> list[torch.Tensor]:
    """Noise of whole numbers, as images have."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(3, *size, generator=generator) * 255).round() for size in SIZES]
