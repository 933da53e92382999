"""Writing a video that takes its place only when it is complete."""

import contextlib
import os
from collections.abc import Iterator

import cv2
import numpy as np
from cbbl_d2.errors import UserError

_DEFAULT_FPS = 25.0


class VideoWriter:
    """Frames of one size to an mp4 file; a folder that is missing is made."""

    def __init__(self, path: str, fps: float):
        """
        Args:
            path: of the file, ending in ".mp4".
            fps: frames per second; 25 where it is no number > 0.
        """
        self.path = path
        self._temporary = f"{path}.partial.mp4"  # OpenCV needs the extension
        self._fps = fps if 0 < fps < float("inf") else _DEFAULT_FPS
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, frame: np.ndarray) -> None:
        """
        Args:
            frame: (H, W, 3) uint8, RGB. A side with an odd number of pixels gets one more, which
                the codec asks for.

        Raises:
            UserError: the file cannot be written.
        """
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._writer is None:
            try:
                os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            except OSError as e:
                raise UserError(f"{self.path}: cannot be written ({e.strerror or e})") from e
            self._size = frame.shape[1::-1]
            fourcc = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(self._temporary, fourcc, self._fps, self._size)
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: OpenCV cannot write this video")
        if frame.shape[1::-1] != self._size:
            # Some streams change their size on the way; the file has one.
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def finish(self) -> None:
        """Put the complete file in its place."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
            os.replace(self._temporary, self.path)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._temporary)


@contextlib.contextmanager
def video_writers() -> Iterator[dict[str, VideoWriter]]:
    """A dict to put writers in: they are finished when the block ends well, else discarded."""
    writers: dict[str, VideoWriter] = {}
    try:
        yield writers
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.discard()
