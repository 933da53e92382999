"""Writing a video that takes its place only when it is complete."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from cbbl_d2.errors import UserError

_DEFAULT_FPS = 25.0


@contextlib.contextmanager
def video_writer(
    path: str, fps: float, shape: Sequence[int]
) -> Iterator[Callable[[np.ndarray], None]]:
    """
    A function that appends frames to an mp4 file: (H, W, 3) uint8, RGB. The file is at ``path``
    when the block ends well, else nowhere.

    Args:
        path: of the file, ending in ".mp4"; a folder that is missing is made.
        fps: frames per second; 25 where it is no number > 0.
        shape: (height, width, ...) of the frames; others are resized to it. A side with an odd
            number of pixels gets one more, which the codec asks for.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = f"{path}.partial.mp4"  # OpenCV needs the extension
    height, width = (side + side % 2 for side in shape[:2])
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e
    fps = fps if 0 < fps < float("inf") else _DEFAULT_FPS
    writer = cv2.VideoWriter(temporary, cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))

    def write(frame: np.ndarray) -> None:
        odd_rows, odd_columns = frame.shape[0] % 2, frame.shape[1] % 2
        frame = np.pad(frame, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
        if frame.shape[:2] != (height, width):  # some streams change it on the way
            frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    try:
        if not writer.isOpened():
            raise UserError(f"{path}: OpenCV cannot write this video")
        yield write
        writer.release()
        os.replace(temporary, path)
    finally:
        writer.release()
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
