import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from cbbl_d2.inference.slicing import INSTALL_SAHI, sahi_is_missing  # noqa: E402


def test_the_advised_version_is_that_of_setup_py(repository):
    text = Path(repository, "setup.py").read_text()
    bound = re.search(r'^SAHI = "(.+)"$', text, re.MULTILINE).group(1)
    assert INSTALL_SAHI == f"pip install --no-deps '{bound}'"


def test_what_is_missing_is_named():
    """It may be a package that sahi requires, which comes with '.[dev]'."""
    line = str(sahi_is_missing("this", ModuleNotFoundError(name="shapely")))
    assert "shapely is not installed" in line and INSTALL_SAHI in line and "[dev]" in line
