import random
import types

import numpy as np
import torch
from cbbl_d2.engine import rng
from cbbl_d2.engine.rng import preserve_rng, rng_state, set_rng_state


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1)


def test_all_generators_are_restored_also_through_a_file(tmp_path):
    draw()  # an odd number of Gaussians: the second of a pair is kept back
    torch.save(rng_state(), tmp_path / "state")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_preserve():
    draw()
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    with preserve_rng():
        draw()
        draw()
    assert draw() == expected


def test_the_generators_of_an_accelerator_belong_to_the_state(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    module = types.SimpleNamespace(
        get_rng_state=generator.get_state, set_rng_state=generator.set_state
    )
    before = rng_state()  # of a machine without
    monkeypatch.setattr(torch, "xpu", module)
    monkeypatch.setattr(rng, "accelerator", lambda: "xpu")
    with preserve_rng():
        drawn = torch.rand(1, generator=generator)
    set_rng_state(before)
    assert torch.rand(1, generator=generator) == drawn


def test_the_state_of_an_earlier_version():
    set_rng_state({**rng_state(), "cuda": []})
