"""Packaging of cbbl_d2. Every bound below has its reason; what has no bound has none."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version():
    """The version that `cbbl_d2/__init__.py` states, read without importing torch."""
    text = (HERE / "cbbl_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


INSTALL_REQUIRES = [
    # detectron2 itself is missing on purpose: the package index has no project of that name, and
    # a direct URL here would build it from source against whatever compiler the machine has.
    # `make install` runs tools/install_detectron2.py, a build of your own works as well, and
    # `import cbbl_d2` says what to do when there is none.
    #
    # >= 2.3: the first torch built for NumPy 2. No upper bound: nothing here depends on one, and
    # a driver or a GPU may need the newest.
    "torch>=2.3",
    "torchvision",  # every release pins the one torch that it fits
    "numpy",
    "fvcore>=0.1.5,<0.1.6",  # Detectron2's own lock: fvcore's minor releases may break it
    "iopath>=0.1.7,<0.1.10",  # the same
    "pycocotools>=2.0.8",  # the first one built for NumPy 2
    # Detectron2's Visualizer imports cv2 and leaves the choice of the package to the user.
    # Headless: no window is opened here, and opencv-python also links the system's libGL and
    # libglib, which a bare Linux machine or container lacks (`import cv2` then fails).
    "opencv-python-headless",
    "Pillow>=9.1",  # the first one with Image.Resampling, which newer ones ask for
    "matplotlib",
    "PyYAML>=5.1",  # the first one with safe defaults in yaml.load, as yacs and fvcore need
    "tqdm",
]

# Sliced inference and training data. sahi asks for opencv-python, which puts its files where those
# of opencv-python-headless are, and pip cannot leave out one requirement of a package. So `make
# install` installs sahi with --no-deps, after what it requires besides and is not above. A test
# compares this list with sahi's metadata.
# >= 0.12.8: the oldest version that was tried. < 0.13: the next ones may require more.
SAHI = "sahi>=0.12.8,<0.13"
SAHI_REQUIRES = [
    "click",
    "fire",
    "opencv-python-headless>=4.12.0.88",  # sahi's bound for opencv-python
    "requests",
    "shapely>=2.0.0",
]

# tools/export_model.py --format onnx, and tools/predict.py --weights model.onnx.
ONNX = [
    "onnx",
    "onnxruntime>=1.19",  # the first one built for NumPy 2
    "torch>=2.5",  # the first one that lets one choose between its two exporters
]

EXTRAS_REQUIRE = {
    "sahi": [SAHI],  # with opencv-python: see docs/large_images.md
    "onnx": ONNX,
    "dev": SAHI_REQUIRES
    + ONNX
    + [
        "pytest>=7.3",  # the first one with `tmp_path_retention_policy`
        "pytest-xdist",
        "ruff>=0.5",  # `ruff check` and `ruff format` with the settings of pyproject.toml
    ],
}

setup(
    name="cbbl_d2",
    version=version(),
    description="C-BBL: Confidence-driven Bounding Box Localization for small object detection, "
    "as a Detectron2 project",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The cbbl_d2 authors",
    license="Apache-2.0",
    packages=find_packages(include=["cbbl_d2", "cbbl_d2.*"]),
    py_modules=["cbbl_onnx"],  # runs exported models; needs nothing of the package
    python_requires=">=3.10",  # the oldest Python that current torch and NumPy support
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
