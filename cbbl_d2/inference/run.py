"""The way from files to predictions that tools/predict.py and tools/visualize.py share."""

from collections.abc import Callable, Sequence

import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from .frames import Frame, Skipped, batches, count_frames, read_frames
from .sources import Source

# From a list of RGB images (H, W, 3) to an Instances for each: BatchPredictor, SlicedPredictor
Predictor = Callable[[list[np.ndarray]], list[Instances]]
# What is done with an image and its predictions: draw them, collect them, ...
Taker = Callable[[Frame, Instances], None]


def predict_all(
    source: Source, predictor: Predictor, takers: Sequence[Taker], batch_size: int = 1
) -> int:
    """
    Predict on every image and every frame of a source, with a progress bar.

    Args:
        takers: each gets each image with its predictions, in this order; images of several sizes
            may come in another order than in the source, see
            :func:`cbbl_d2.inference.frames.batches`.
        batch_size: images that the predictor gets at once.

    Returns:
        how many files could not be read; each of them is named on stderr.

    Raises:
        UserError: see the predictor and the takers.
    """
    skipped = Skipped()
    unit = "frame" if any(map(source.is_video, source.files)) else "image"
    with tqdm(total=count_frames(source), unit=unit) as bar:
        for batch in batches(read_frames(source, skipped), batch_size):
            for frame, instances in zip(batch, predictor([f.image for f in batch]), strict=True):
                for take in takers:
                    take(frame, instances)
                bar.update()
    return skipped.count
