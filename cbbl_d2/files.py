"""Writing files so that a reader finds the old content or the new one, never half of it."""

import contextlib
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from cbbl_d2.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a file for writing that takes its place at ``path`` only when the block ends well.

    If the block raises, or the process dies, ``path`` keeps its old content (or stays absent).

    Args:
        path: the file to create or replace; its folder must exist.
        mode: "w" (text, UTF-8) or "wb".

    Raises:
        ValueError: another mode.
        OSError: the folder cannot be written to.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode must be 'w' or 'wb', not {mode!r}")
    path = os.path.realpath(path)  # a symbolic link keeps pointing where it points
    folder, name = os.path.split(path)
    # The same folder, so that the final rename stays within one file system.
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        with open(handle, mode, encoding="utf-8" if mode == "w" else None) as f:
            yield f
            f.flush()
            # Without it a power failure may keep the rename and lose the content.
            os.fsync(f.fileno())
        os.chmod(temporary, _mode_of(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def open_whole(path: str, mode: str = "w", cure: str = "") -> Iterator[IO]:
    """
    :func:`atomic_write` for files that a user asked for: it makes the folder, too.

    Args:
        cure: what to do where the file cannot be written, for the message.

    Raises:
        UserError: it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with atomic_write(path, mode) as f:
            yield f
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror or e})" + (f": {cure}" if cure else "")
        ) from e


def remove_unfinished(folder: str) -> None:
    """
    Remove what processes that died in :func:`atomic_write` left in ``folder``. Only to be called
    where no other process is writing into it.
    """
    for path in glob.glob(os.path.join(glob.escape(folder), ".*.tmp")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """
    Give a temporary folder to fill; it becomes ``path`` only when the block ends well.

    If another process made ``path`` meanwhile, its folder stays and this one's is dropped. Callers
    that may run twice at once on one machine must hold a lock; on several machines they need none.

    Args:
        path: the folder to create; missing parents are created too.

    Raises:
        OSError: the parent cannot be written to.
    """
    path = os.path.abspath(path)
    # One fixed name a machine: what a killed process left behind is cleared by the next attempt,
    # and two machines that share the disk do not meet even where locks reach only one of them.
    temporary = f"{path}.partial-{platform.node()}"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError:
            if not os.path.isdir(path):
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _mode_of(path: str) -> int:
    """Permission bits for ``path``: those it has, or those a newly created file would get."""
    try:
        return os.stat(path).st_mode & 0o777
    except FileNotFoundError:
        # mkstemp makes private files; there is no way to read the umask without setting it.
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
