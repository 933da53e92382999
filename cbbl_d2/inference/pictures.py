"""Predictions, beside the ground truth where there is one, as pictures and videos in a folder."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
from cbbl_d2.errors import UserError
from cbbl_d2.visualization import contact_sheet, draw_instances, draw_pair, shrink
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from .frames import Frame, Skipped
from .names import OVERVIEW, picture_names
from .video import video_writer
from .writers import write_png

logger = logging.getLogger("cbbl_d2.pictures")

# The pictures of the contact sheet are kept in memory until the end: at most 48, at this width.
_MAX_OVERVIEW, _OVERVIEW_WIDTH = 48, 1500


@dataclasses.dataclass(kw_only=True)
class Pictures:
    """
    A PNG file for each image and an MP4 file for each video, called as
    :func:`cbbl_d2.inference.names.picture_names` says. As a context manager: videos and the contact
    sheet are written when the block ends well.

    Attributes:
        folder: of the pictures; it is made.
        files: the images and videos, in the order of their ``Frame.source_index``.
        metadata: names, colors and keypoints of the classes.
        threshold: the lowest score of what is drawn, for the captions.
        above: draw no prediction with a lower score: only for a model that lets through more than
            ``threshold``, as AP needs it.
        scale: enlargement; None: that of :func:`cbbl_d2.visualization.enlargement`.
        ground_truth: draw that of the dataset dicts beside the predictions.
        uncertainty: draw the deviation of each side, see :func:`draw_instances`.
        overview: also write ``overview.png``, a contact sheet of two pictures or more.
        video_folder: of the videos; None: ``folder``.
        drawn: how many pictures there are.
        num_objects: how many predictions are drawn in them and in the videos.
        skipped: counts the images that could not be drawn.
    """

    folder: str
    files: Sequence[str]
    metadata: Metadata
    threshold: float
    above: float | None = None
    scale: float | None = None
    ground_truth: bool = True
    uncertainty: bool = False
    overview: bool = False
    video_folder: str | None = None

    def __post_init__(self) -> None:
        self._names = picture_names(self.files)
        self._for_overview: list[np.ndarray] = []
        self._stack = contextlib.ExitStack()
        self._videos: dict[str, Callable[[np.ndarray], None]] = {}
        self.drawn = self.num_objects = 0
        self.skipped = Skipped()

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        if error[0] is None and len(self._for_overview) > 1:
            self._write_overview()

    def take(self, frame: Frame, instances: Instances) -> None:
        """
        Draw one image, or the next frame of a video. An image that cannot be drawn is named on
        stderr, and counted.

        Args:
            instances: on the CPU, in pixels of the image.

        Raises:
            UserError: the file cannot be written, the frame of a video is too large to draw, or
                there are no deviations to draw.
        """
        if self.uncertainty and not instances.has("pred_boxes_std"):
            raise UserError(
                "--uncertainty: the boxes of this detector have no deviations: leave it out, or "
                "give a detector whose boxes are C-BBL's"
            )
        if self.above is not None:
            instances = instances[instances.scores >= self.above]
        name = self._names[frame.source_index]
        if frame.video is not None:
            self._take_video(frame, instances, name)
            return
        record = (frame.record or {}) if self.ground_truth else {}
        try:
            picture = draw_pair(
                frame.image,
                record.get("annotations"),
                instances,
                self.metadata,
                scale=self.scale,
                name=os.path.basename(frame.file_name),
                note=f"score \N{GREATER-THAN OR EQUAL TO} {self.threshold:g}{self._bands()}",
                uncertainty=self.uncertainty,
            )
        except UserError as e:
            self.skipped(str(e))
            return
        write_png(os.path.join(self.folder, f"{name}.png"), picture)
        self.drawn += 1
        self.num_objects += len(instances)
        if self.overview and len(self._for_overview) < _MAX_OVERVIEW:
            self._for_overview.append(shrink(picture, _OVERVIEW_WIDTH))

    def nothing_found(self) -> str:
        """A line to print where no image has a prediction."""
        return (
            f"No prediction has a score of {self.threshold:g} or more: try a lower "
            "--confidence-threshold"
        )

    def _take_video(self, frame: Frame, instances: Instances, name: str) -> None:
        """Without the caption of a picture, whose height is not the same for all frames."""
        picture = draw_instances(
            frame.image, instances, self.metadata, self.scale, self.uncertainty
        )
        if frame.video not in self._videos:
            path = os.path.join(self.video_folder or self.folder, f"{name}.mp4")
            writer = video_writer(path, frame.fps, picture.shape)
            self._videos[frame.video] = self._stack.enter_context(writer)
        self._videos[frame.video](picture)
        self.num_objects += len(instances)

    def _bands(self) -> str:
        return ", bands: one deviation of each side" if self.uncertainty else ""

    def _write_overview(self) -> None:
        sheet = contact_sheet(self._for_overview)
        write_png(os.path.join(self.folder, f"{OVERVIEW}.png"), sheet)
        if self.drawn > len(self._for_overview):
            logger.info(f"{OVERVIEW}.png shows the first {len(self._for_overview)} pictures")
