"""The folder that predictions are written to."""

import os
from collections.abc import Sequence

from cbbl_d2.errors import UserError


def make_folder(folder: str, files: Sequence[str], parts: Sequence[str] = ("",)) -> None:
    """
    Args:
        folder: to make, if it is not there.
        files: what is predicted on.
        parts: the folders in it that get pictures; "" is the folder itself.

    Raises:
        UserError: it cannot be made, or a picture might replace one of the files.
    """
    sources = {os.path.realpath(os.path.dirname(x)) for x in files}
    if any(os.path.realpath(os.path.join(folder, part)) in sources for part in parts):
        raise UserError(f"{folder}: files to predict on are in it, choose another --output")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made a folder ({e.strerror})") from e
