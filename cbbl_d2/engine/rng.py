"""The state of all global random number generators, as plain tensors and numbers."""

import random
from contextlib import contextmanager
from typing import Any, Dict

import numpy as np
import torch
from cbbl_d2.devices import accelerator, generator_states, set_generator_states


def rng_state() -> Dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, in types that ``torch.load`` accepts
    with ``weights_only=True``."""
    version, internal, gauss_next = random.getstate()
    kind = accelerator()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        **({kind: generator_states(kind)} if kind else {}),
    }


def set_rng_state(state: Dict[str, Any]) -> None:
    """Inverse of :func:`rng_state`. Devices that the saving run did not have keep their state."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    kind = accelerator()
    if kind in state:
        set_generator_states(kind, state[kind])


@contextmanager
def preserve_rng():
    """Leaves all generators as they were, whatever the block draws."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
