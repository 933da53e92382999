"""The folder of a training: one program writes to it, and a refused one leaves it as it is."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write
from detectron2.utils import comm

__all__ = ["claimed", "config_restored"]


@contextlib.contextmanager
def claimed(folder: str) -> Iterator[None]:
    """
    Make a folder and lock it, so that a second training in it ends in one line. The system releases
    the lock when this process ends, by whatever cause: it is of this process alone, and not of the
    workers of its data loader, which outlive it for some seconds.

    Raises:
        UserError: the folder cannot be written to, or another process holds the lock.
    """
    if not comm.is_main_process():  # of several, which share the folder
        yield
        return
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(path, "a")  # noqa: SIM115
    except OSError as e:
        raise UserError(
            f"OUTPUT_DIR {folder}: cannot be written to ({e.strerror or e}): choose another one"
        ) from e
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise UserError(
                f"OUTPUT_DIR {folder}: another training is writing to it: wait for that one, or "
                "choose another OUTPUT_DIR"
            ) from e
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def config_restored(folder: str) -> Iterator[None]:
    """
    Detectron2 writes ``config.yaml`` before the model is built and the checkpoint loaded, which can
    be refused. If this block raises, the folder has the config of its checkpoints again.
    """
    if not comm.is_main_process():
        yield
        return
    path, before = os.path.join(folder, "config.yaml"), None
    if os.path.isfile(path):
        with open(path, "rb") as f:
            before = f.read()
    try:
        yield
    except BaseException:
        if before is not None:
            with atomic_write(path, "wb") as f:
                f.write(before)
        elif os.path.isfile(path):
            os.remove(path)
        raise
