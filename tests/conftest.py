import os

import pytest
import torch

REPOSITORY = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The models here are tiny: threads only make them wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(autouse=True)
def _no_writing_into_the_repository(monkeypatch, data_root, tmp_path):
    """Data sets are made once a session, in a temporary folder; outputs go to ``tmp_path``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", data_root)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def repository():
    """Absolute path of the checkout."""
    return REPOSITORY


@pytest.fixture
def tiny_cfg(repository, tmp_path):
    """The config of the instant test with an output folder in ``tmp_path``."""
    from cbbl_d2.engine import load_config

    cfg = load_config(os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml"))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg
