"""The one way in which this project writes an annotation file in COCO format."""

import json
import os
from collections.abc import Sequence

from cbbl_d2.files import open_whole
from cbbl_d2.messages import count

__all__ = ["CocoWriter", "numbered_categories"]


def numbered_categories(classes: Sequence[str]) -> list[dict]:
    """``categories`` with the ids 1, 2, ..."""
    return [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]


class CocoWriter:
    """Collects images and annotations, with ids from 1 on: pycocotools takes 0 for "no match"."""

    def __init__(self, categories: Sequence[dict], **info):
        """
        Args:
            categories: as they will stand in the file.
            info: what else is to be told of the data set: description, version, ...
        """
        self._content = {
            **({"info": info, "licenses": []} if info else {}),
            "categories": list(categories),
            "images": [],
            "annotations": [],
        }

    def add_image(
        self, file_name: str, width: int, height: int, id: int | str | None = None, **fields
    ) -> int | str:
        """
        Args:
            file_name: starts at the folder of the images.
            id: None gives the next number.
            fields: more of its entry.

        Returns:
            its id.
        """
        images = self._content["images"]
        id = len(images) + 1 if id is None else id
        # The same file on every system.
        name = file_name.replace(os.sep, "/")
        images.append({"id": id, "file_name": name, "width": width, "height": height, **fields})
        return id

    def add_annotation(self, image_id: int | str, category_id: int, **fields) -> None:
        """
        Args:
            fields: the others, ``bbox`` (x, y, width, height in pixels), ``area`` and ``iscrowd``
                among them.
        """
        annotations = self._content["annotations"]
        ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
        annotations.append({**ids, **fields})

    def add_object(
        self,
        image_id: int | str,
        category_id: int,
        box: Sequence[float],
        ignore: bool = False,
        **fields,
    ) -> None:
        """
        Args:
            box: x, y, width, height in pixels.
            ignore: not an object, and a detection of this class that lies in the box counts neither
                for nor against: ``"iscrowd": 1``. Detectron2 leaves such boxes out of training.
            fields: more of its entry.
        """
        area = box[2] * box[3]
        self.add_annotation(
            image_id, category_id, bbox=list(box), area=area, iscrowd=int(ignore), **fields
        )

    def add_ignored(self, image_id: int | str, box: Sequence[float]) -> None:
        """A box to ignore for every class: COCO's metric looks at one class at a time."""
        for category in self._content["categories"]:
            self.add_object(image_id, category["id"], box, ignore=True)

    @property
    def content(self) -> dict:
        """What is to be written."""
        return self._content

    @property
    def num_images(self) -> int:
        return len(self._content["images"])

    @property
    def num_annotations(self) -> int:
        return len(self._content["annotations"])

    @property
    def num_ignored(self) -> int:
        """Those that are no objects, see :meth:`add_object`."""
        return sum(a["iscrowd"] for a in self._content["annotations"])

    def write(self, json_file: str, cure: str = "") -> str:
        """
        Write the file whole or not at all; its folder is made.

        Args:
            cure: for the message that it cannot be written.

        Returns:
            its path, and how many images and objects it holds.

        Raises:
            UserError: it cannot be written.
        """
        with open_whole(json_file, cure=cure) as f:
            json.dump(self._content, f)
        return (
            f"{json_file}: {count(self.num_images, 'image', 'images')}, "
            f"{count(self.num_annotations - self.num_ignored, 'object', 'objects')}"
        )
