"""Detectron2's training data loader, made to continue where an interrupted run stopped."""

import collections
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import (
    _train_loader_from_config,
    filter_images_with_only_crowd_annotations,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

from .broken_images import SkipBrokenImages
from .small_object_augmentation import build_train_mapper


class ResumableSampler(Sampler):
    """
    An infinite sampler that starts after the batches which an earlier run has used.

    With aspect ratio grouping a batch is complete when one of two buckets (wide and tall images)
    is full, so images can be drawn long before they are used. Those still waiting in a bucket
    come first here.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        skip_batches: int = 0,
        is_wide: list[bool] | None = None,
    ):
        """
        Args:
            sampler: yields the same indices each time it is iterated (all of Detectron2's do).
            batch_size: of this process.
            skip_batches: number of batches to leave out.
            is_wide: for each image, whether it is wider than tall; None without aspect ratio
                grouping.
        """
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip_batches = skip_batches
        self.is_wide = is_wide

    def __iter__(self) -> Iterator[int]:
        indices = iter(self.sampler)
        buckets = ([], [])
        skipped = 0
        while skipped < self.skip_batches:
            index = next(indices)
            bucket = buckets[bool(self.is_wide and self.is_wide[index])]
            bucket.append(index)
            if len(bucket) == self.batch_size:
                bucket.clear()
                skipped += 1
        yield from buckets[0]
        yield from buckets[1]
        yield from indices


def with_masks(dicts: list[dict], filter_empty: bool) -> list[dict]:
    """
    Leave out the objects without a mask, which Detectron2's mapper cannot take among others.

    Args:
        dicts: Detectron2's dataset dicts.
        filter_empty: leave out images without objects, too.
    """
    kept = [
        {**d, "annotations": [a for a in d.get("annotations", ()) if "segmentation" in a]}
        for d in dicts
    ]
    return filter_images_with_only_crowd_annotations(kept) if filter_empty else kept


class ResumableTrainLoader:
    """
    Iterates like the result of Detectron2's ``build_detection_train_loader``, and in addition

    * knows its place in the data stream: :meth:`state_dict` and :meth:`load_state_dict`. Exact
      without data-loading workers; with workers, which read ahead and share out the images in
      their own order, a few images around the place can come twice or not at all;
    * goes on when an image is broken, see :class:`SkipBrokenImages`;
    * remembers the file names of the last two batches, in ``last_file_names``, the newest last.

    It builds the underlying loader when it is first asked for a batch: workers start with the
    place in mind that a checkpoint has set.
    """

    @configurable
    def __init__(self, *, dataset, mapper, sampler=None, aspect_ratio_grouping=True, **kwargs):
        """
        Args:
            dataset, mapper, sampler, aspect_ratio_grouping, kwargs: as for Detectron2's
                ``build_detection_train_loader``, whose ``total_batch_size`` is needed. Sampler
                None: each epoch in a new random order.

        Also callable as ``ResumableTrainLoader(cfg, mapper=None)``, by default with that of
        :func:`build_train_mapper`.
        """
        self._is_wide = None
        self._num_batches = 0
        self.last_file_names = collections.deque(maxlen=2)
        if isinstance(dataset, list):
            if aspect_ratio_grouping:
                self._is_wide = [d["width"] > d["height"] for d in dataset]
            if sampler is None:
                # Here, as its seed belongs to the place in the data stream.
                sampler = TrainingSampler(len(dataset))
            # Here and not later, so that the list is freed: on COCO it takes gigabytes, and once
            # more for each worker.
            dataset = DatasetFromList(dataset, copy=False)
            # Not Detectron2's MapDataset: see SkipBrokenImages.
            dataset, mapper = SkipBrokenImages(dataset, mapper), None
        self._args: dict[str, Any] = dict(
            kwargs,
            dataset=dataset,
            mapper=mapper,
            sampler=sampler,
            aspect_ratio_grouping=aspect_ratio_grouping,
        )

    @classmethod
    def from_config(cls, cfg, mapper=None):
        if mapper is None:
            mapper = build_train_mapper(cfg)
        args = _train_loader_from_config(cfg, mapper=mapper)
        if cfg.MODEL.MASK_ON and isinstance(args["dataset"], list):
            masked = with_masks(args["dataset"], cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
            if len(masked) < len(args["dataset"]):  # the sampler needs their number
                return _train_loader_from_config(cfg, mapper=mapper, dataset=masked)
            args["dataset"] = masked
        return args

    def __iter__(self):
        args = dict(self._args)
        if args["sampler"] is not None:  # None for a data set that is a stream
            args["sampler"] = ResumableSampler(
                args["sampler"],
                args["total_batch_size"] // comm.get_world_size(),
                self._num_batches,
                self._is_wide,
            )
        batches = iter(build_detection_train_loader(**args))
        # Starting its iterator, a DataLoader draws a seed from torch's global generator. A resumed
        # run would draw once more than one that was never interrupted: give the number back. (The
        # augmentations of Detectron2 draw from NumPy.)
        with torch.random.fork_rng(devices=[]):
            batch = next(batches)
        while True:
            self._num_batches += 1
            self.last_file_names.append([str(item.get("file_name", "?")) for item in batch])
            yield batch
            batch = next(batches)

    def state_dict(self) -> dict[str, int]:
        state = {"num_batches": self._num_batches}
        seed = getattr(self._args["sampler"], "_seed", None)
        if seed is not None:
            state["seed"] = int(seed)
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """To be called before the first batch."""
        self._num_batches = state["num_batches"]
        if "seed" in state:
            # Detectron2 v0.6 has no public way to choose the seed of its samplers by config.
            self._args["sampler"]._seed = state["seed"]
