import contextlib
import importlib.util
import itertools
import json
import os

import pytest
import torch
from PIL import Image

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  # refuses to come after the standard library's distutils

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


@pytest.fixture(autouse=True)
def _limit_of_pillow(monkeypatch):
    """sahi, called directly, lifts it for the whole process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture
def repository():
    """Absolute path of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def load_script():
    """
    ``load_script("tools/predict.py")``: a script as a fresh module, so that a test may replace what
    it has.
    """

    def load(path):
        name = os.path.splitext(os.path.basename(path))[0]
        spec = importlib.util.spec_from_file_location(name, os.path.join(REPOSITORY, path))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny_cfg(repository, tmp_path):
    """The config of the instant test with an output folder in ``tmp_path``."""
    from cbbl_d2.engine import load_config

    cfg = load_config(os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml"))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


# -- a data set in COCO format ---------------------------------------------------------------------

WIDTH, HEIGHT = 64, 48
_numbers = itertools.count()


@pytest.fixture
def content():
    """A sound file: ids with gaps that do not start at 1, a crowd, a polygon, unsorted classes."""
    car, ship = {"category_id": 0, "iscrowd": 0}, {"category_id": 7, "iscrowd": 0}
    polygon = {"segmentation": [[5, 5, 11, 5, 11, 11]], "keypoints": [5, 5, 2]}
    crowd = {"category_id": 0, "iscrowd": 1}
    return {
        "images": [
            {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
            {"id": 4, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 7, "name": "ship"}, {"id": 0, "name": "car"}],
        "annotations": [
            {"id": 11, "image_id": 9, "bbox": [1, 2, 10, 12], "area": 120, **ship},
            {"id": 12, "image_id": 4, "bbox": [30.5, 20, 4, 3.25], "area": 13, **car},
            {"id": 13, "image_id": 4, "bbox": [0, 0, 64, 48], "area": 3072, **crowd},
            {"id": 14, "image_id": 4, "bbox": [5, 5, 6, 6], "area": 36, **ship, **polygon},
        ],
    }


@pytest.fixture
def new_name():
    """``new_name()``: a data set name that nobody has used; Detectron2 never forgets metadata."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    names = []

    def new():
        names.append(f"data_set_of_a_test_{next(_numbers)}")
        return names[-1]

    yield new
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in names:
            if name in catalog:
                catalog.remove(name)


@pytest.fixture
def folder(tmp_path):
    """A folder with the images of ``content``."""
    (tmp_path / "images").mkdir()
    for file_name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / file_name)
    return tmp_path


@pytest.fixture
def write(folder):
    """``write(content)``: path of an annotation file with this content, a text or JSON."""

    def write(content):
        path = folder / "annotations.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def register(folder, write, new_name):
    """``register(content)``: the name of a registered data set."""
    from cbbl_d2.data import register_coco_format

    def register(content):
        name = new_name()
        register_coco_format(name, write(content), str(folder / "images"))
        return name

    return register


@pytest.fixture
def error_of():
    """``error_of(call, *args)``: the message of the UserError that the call raises, one line."""
    from cbbl_d2.errors import UserError

    def error_of(call, *args):
        with pytest.raises(UserError) as info:
            call(*args)
        message = str(info.value)
        assert "\n" not in message
        return message

    return error_of
