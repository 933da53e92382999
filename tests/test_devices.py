"""Nothing is for one kind of device, but where torch or Detectron2 leave no choice."""

import ast
import re
import types
from pathlib import Path

import pytest
import torch
from cbbl_d2.devices import (
    accelerator,
    device_kind,
    device_title,
    generator_states,
    set_generator_states,
    usable_device,
)
from cbbl_d2.errors import ConfigError

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "train_net.py",
    *(p for x in ("cbbl_d2", "tools", "benchmarks", "configs") for p in (ROOT / x).rglob("*.py")),
]
KINDS = ("cuda", "mps", "xpu", "hpu", "npu")

# Who may name a kind of device, and why.
ALLOWED = {
    "cbbl_d2/devices.py": "asks for all of them",
    "cbbl_d2/compat.py": "Detectron2 v0.6 wants CUDA to start several processes",
    "cbbl_d2/engine/launch.py": "Detectron2 starts several processes on CUDA or on the CPU",
    "cbbl_d2/engine/config_checks.py": "the same; its mixed precision is that of CUDA",
    "tools/lazyconfig_train_net.py": "its mixed precision is that of CUDA",
    "benchmarks/head.py": "measures on CUDA or on the CPU",
}


def named_devices(tree: ast.AST) -> list[int]:
    """Lines with ``torch.cuda``, ``x.cuda()``, "cuda", "cuda:0", an autocast of CUDA, NCCL."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in KINDS:
            found.append(node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"(?i)({'|'.join(KINDS)}|nccl)(:\d+)?", node.value):
                found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom):
            if re.search(rf"\.({'|'.join(KINDS)})\b", f".{node.module}"):
                found.append(node.lineno)
    return found


def misplaced_tensors(tree: ast.AST) -> list[int]:
    """Lines with a tensor that is made without a device, or of float64, which mps has not."""
    makers = "arange empty eye full linspace ones rand randint randn randperm tensor zeros".split()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            given = {keyword.arg for keyword in node.keywords}
            if (of_torch and node.func.attr in makers and "device" not in given) or (
                node.func.attr == "double"
            ):
                found.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in ("float64", "double"):
            found.append(node.lineno)
    return found


def test_who_names_a_kind_of_device():
    naming = {
        str(path.relative_to(ROOT))
        for path in FILES
        if named_devices(ast.parse(path.read_text("utf-8")))
    }
    assert naming == set(ALLOWED)


def test_tensors_are_made_where_the_model_is():
    wrong = []
    for part in ("modeling", "distribution"):
        for path in (ROOT / "cbbl_d2" / part).glob("*.py"):
            lines = misplaced_tensors(ast.parse(path.read_text("utf-8")))
            # The grid is computed once, on the CPU, and becomes a buffer of float32.
            wrong += [f"{path.name}:{line}" for line in lines if path.name != "grid.py"]
    assert not wrong


@pytest.mark.parametrize(
    "code, number",
    [
        ("torch.cuda.synchronize()", 1),
        ("x = x.cuda()", 1),
        ("x.to('cuda:0')", 1),
        ("torch.autocast('cuda')", 1),
        ("from torch.cuda.amp import autocast", 1),
        ("init(backend='NCCL')", 1),
        ("x.to(device), 'on cuda or cpu', x.cpu()", 0),
    ],
)
def test_names_are_found(code, number):
    assert len(named_devices(ast.parse(code))) == number


@pytest.mark.parametrize(
    "code, number",
    [
        ("torch.zeros(3)", 1),
        ("x.double()", 2),
        ("x.to(torch.float64)", 1),
        ("torch.zeros(3, device=x.device), x.new_zeros(3), torch.zeros_like(x)", 0),
    ],
)
def test_tensors_are_found(code, number):
    assert len(misplaced_tensors(ast.parse(code))) == number


# -- the devices of a machine ----------------------------------------------------------------------


@pytest.fixture
def without_gpu(monkeypatch):
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delattr(torch, "accelerator", raising=False)


def with_device(monkeypatch, kind, number=1):
    module = torch.backends.mps if kind == "mps" else getattr(torch, kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: number)


def test_a_machine_without_gpu(without_gpu):
    assert accelerator() is None and device_title("cpu") == "cpu"
    assert usable_device("cpu", "KEY") == "cpu" and device_kind("cpu:0") == "cpu"
    # Detectron2's default, from a config that may have been written elsewhere
    assert usable_device("cuda", "KEY") == usable_device("cuda:1", "KEY") == "cpu"
    with pytest.raises(ConfigError, match=r"KEY = 'cuda': torch .* what it can use is cpu$"):
        usable_device("cuda", "KEY", fall_back=False)


@pytest.mark.parametrize("device", ["mps", "xpu", "xpu:0", "meta", "xla", "vulkan"])
def test_a_device_that_is_not_there(without_gpu, device):
    with pytest.raises(ConfigError, match=f"KEY = '{device}': torch .* cannot use it") as e:
        usable_device(device, "KEY")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", None, "cuda 1", "cpu,"])
def test_a_name_that_is_none(device):
    with pytest.raises(ConfigError, match="must be a device such as"):
        usable_device(device, "KEY")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_machine_with_one(without_gpu, monkeypatch, kind):
    with_device(monkeypatch, kind)
    assert accelerator() == kind
    assert usable_device(kind, "KEY") == kind and usable_device("cpu", "KEY") == "cpu"
    assert usable_device(f"{kind}:0", "KEY") == f"{kind}:0"
    with pytest.raises(ConfigError, match=f"KEY = '{kind}:1': this machine has 1, numbered from 0"):
        usable_device(f"{kind}:1", "KEY")
    with pytest.raises(ConfigError, match=f"what it can use is {kind} or cpu"):
        usable_device("meta", "KEY")


def test_torch_is_asked_for_the_accelerator(without_gpu, monkeypatch):
    """Where it can be: also for kinds that are not listed here."""
    asked = types.SimpleNamespace(
        is_available=lambda: True, current_accelerator=lambda: torch.device("mtia")
    )
    monkeypatch.setattr(torch, "accelerator", asked, raising=False)
    assert accelerator() == "mtia"


@pytest.mark.parametrize("number", [1, 3])
def test_generators_of_every_device_are_restored(monkeypatch, number):
    """By both ways in which torch's modules hand them out: mps has one device alone."""
    generators = [torch.Generator().manual_seed(i) for i in range(number)]
    module = types.SimpleNamespace(
        device_count=lambda: number,
        get_rng_state=lambda i=0: generators[i].get_state(),
        set_rng_state=lambda state, i=0: generators[i].set_state(state),
    )
    if number > 1:
        module.get_rng_state_all = lambda: [g.get_state() for g in generators]
    monkeypatch.setattr(torch, "xpu", module)
    states = generator_states("xpu")
    drawn = [torch.rand(1, generator=g).item() for g in generators]
    assert [torch.rand(1, generator=g).item() for g in generators] != drawn
    set_generator_states("xpu", states)
    assert [torch.rand(1, generator=g).item() for g in generators] == drawn
    set_generator_states("xpu", states[:1])  # of a machine with one
    set_generator_states("xpu", [])  # of one without
    assert torch.rand(1, generator=generators[0]).item() == drawn[0]
