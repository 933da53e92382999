"""
Where a model runs: cpu, cuda, xpu, mps or what else torch has. What depends on it is asked of torch
by name here, so that little else has to know one kind of device from another.
"""

from types import ModuleType
from typing import List, Optional

import torch
from cbbl_d2.errors import ConfigError

__all__ = [
    "accelerator",
    "device_kind",
    "device_title",
    "generator_states",
    "set_generator_states",
    "usable_device",
]

# For torch < 2.6, which has no torch.accelerator.
_KINDS = ("cuda", "xpu", "mps")


def device_kind(device: str) -> str:
    """``cuda:1`` is a "cuda"."""
    return torch.device(device).type


def _module(kind: str) -> Optional[ModuleType]:
    """``torch.cuda``, ``torch.xpu``, ..."""
    return getattr(torch, kind, None)


def _is_available(kind: str) -> bool:
    if kind == "mps":  # torch.mps has no is_available() before 2.9
        return torch.backends.mps.is_available()
    return bool(getattr(_module(kind), "is_available", bool)())


def accelerator() -> Optional[str]:
    """The kind of device, other than the CPU, that torch can use on this machine."""
    if hasattr(torch, "accelerator"):
        found = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator().type if found else None
    return next((kind for kind in _KINDS if _is_available(kind)), None)


def usable_device(device: str, key: str, fall_back: bool = True) -> str:
    """
    Args:
        device: as a config or a command line says.
        key: where it says so, for the message.
        fall_back: where torch finds no GPU, "cuda", Detectron2's default, becomes "cpu".

    Returns:
        ``device``, or "cpu" instead.

    Raises:
        ConfigError: there is no such device, or not on this machine.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ConfigError(
            f"{key} = {device!r}: must be a device such as cuda, cuda:1, xpu, mps or cpu"
        ) from e
    here = " or ".join(kind for kind in (accelerator(), "cpu") if kind)
    if not _is_available(parsed.type):
        if parsed.type == "cuda" and fall_back:
            return "cpu"
        raise ConfigError(
            f"{key} = {device!r}: torch {torch.__version__} cannot use it on this machine; what it "
            f"can use is {here}"
        )
    number = getattr(_module(parsed.type), "device_count", lambda: 1)()
    if parsed.type != "cpu" and (parsed.index or 0) >= number:
        raise ConfigError(f"{key} = {device!r}: this machine has {number}, numbered from 0")
    return device


def device_title(device: str) -> str:
    """The name that the driver of an accelerator gives, "NVIDIA H100"; else ``device`` itself."""
    kind = device_kind(device)
    name = None if kind == "cpu" else getattr(_module(kind), "get_device_name", None)
    return name(device) if name is not None else device


def generator_states(kind: str) -> List[torch.Tensor]:
    """The states of the random number generators of all devices of a kind."""
    module = _module(kind)
    if hasattr(module, "get_rng_state_all"):
        return module.get_rng_state_all()
    return [module.get_rng_state()]


def set_generator_states(kind: str, states: List[torch.Tensor]) -> None:
    """Inverse of :func:`generator_states`. Devices that have no state keep theirs."""
    module = _module(kind)
    if hasattr(module, "get_rng_state_all"):
        for index, state in zip(range(module.device_count()), states):
            module.set_rng_state(state, index)
    elif states:
        module.set_rng_state(states[0])
