"""
Run a detector that tools/export_model.py has written as ONNX. This file needs onnxruntime, NumPy
and Pillow alone, and no other file of its project: copy it to where the detector runs.

    python -m cbbl_onnx model.onnx photo.jpg

    from cbbl_onnx import Detector

    detector = Detector("model.onnx")
    found = detector("photo.jpg")
    for box, score, name in zip(found.boxes, found.scores, found.names):
        print(name, score, box)

Class names, thresholds, and how an image is resized are in the model file.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

__all__ = ["Detections", "Detector", "OnnxError", "read_image"]


class OnnxError(ValueError):
    """A model file or an image that cannot be used; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """
    The N objects of an image, best score first.

    Attributes:
        boxes: (N, 4) float32: x_min, y_min, x_max, y_max in pixels of the image as it was given
            (a file: after its EXIF orientation).
        scores: (N,) float32.
        classes: (N,) int64, from 0.
        names: of the classes, N words.
        deviations: (N, 4) float32: the standard deviation of each side of the box as the detector
            estimates it, in pixels; None for a detector without C-BBL.
        masks: (N, M, M) float32: how probably each part of the box belongs to the object; None for
            a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: list[str]
    deviations: np.ndarray | None = None
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to_dicts(self) -> list[dict]:
        """Plain values for JSON, without masks: "name", "class", "score", "box", "deviations"."""
        found = [
            {"name": name, "class": int(class_), "score": float(score), "box": box.tolist()}
            for name, class_, score, box in zip(self.names, self.classes, self.scores, self.boxes)
        ]
        for values, row in zip(found, () if self.deviations is None else self.deviations.tolist()):
            values["deviations"] = row
        return found


class Detector:
    """
    Attributes:
        class_names: in the order of the classes.
        category_ids: of the classes, in COCO files of the data set of the training.
        score_threshold: no detection has a lower score.
        nms_threshold: IoU of two boxes of a class above which the lower score is dropped.
        max_detections: in an image at most; -1: any number.
        has_masks: whether it finds masks, too.
        min_size, max_size: the short side that images are resized to, in pixels, unless the long
            one would be longer than max_size; a min_size of 0: they are not resized.
        metadata: the texts of the file from which these are.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        threads: int = 0,
        providers: Sequence = ("CPUExecutionProvider",),
    ):
        """
        Args:
            model: path of the ONNX file.
            threads: CPU threads; 0: as many as there are cores.
            providers: of onnxruntime, where the model runs.

        Raises:
            OnnxError: no such file, or not one of tools/export_model.py.
        """
        path = os.fspath(model)
        if not os.path.isfile(path):
            raise OnnxError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; they are also raised
        try:
            self._session = onnxruntime.InferenceSession(path, options, list(providers))
        except Exception as e:  # onnxruntime's errors have no class in common
            raise OnnxError(f"{path}: {_one_line(e)}") from e
        self._outputs = [x.name for x in self._session.get_outputs()]
        self.has_masks = "masks" in self._outputs
        known = self.metadata = self._session.get_modelmeta().custom_metadata_map
        try:
            self.class_names: list[str] = json.loads(known["class_names"])
            self.category_ids: list[int] = json.loads(known["category_ids"])
            self.score_threshold = float(known["score_threshold"])
            self.nms_threshold = float(known["nms_threshold"])
            self.max_detections = int(known["max_detections"])
            self._is_bgr = {"RGB": False, "BGR": True}[known["input_format"]]
            self.min_size, self.max_size = int(known["min_size"]), int(known["max_size"])
        except (KeyError, ValueError) as e:
            raise OnnxError(
                f"{path}: not a detector of tools/export_model.py, its metadata lack {e}"
            ) from e

    def __call__(
        self, image: str | os.PathLike | Image.Image | np.ndarray, score_threshold: float = 0.0
    ) -> Detections:
        """
        Args:
            image: path of an image; or Pillow's; or an array (H, W, 3) or (H, W) of uint8, RGB.
            score_threshold: the lowest score, where it is higher than that of the file.

        Raises:
            OnnxError: the image cannot be read, or does not fit into memory.
        """
        image = _to_rgb(image)
        width, height = image.size
        resized = self._resized(image)
        pixels = np.asarray(resized)
        if self._is_bgr:
            pixels = pixels[:, :, ::-1]
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        try:
            values = dict(zip(self._outputs, self._session.run(None, {"image": pixels})))
        except Exception as e:
            raise OnnxError(f"an image of {width}x{height} pixels: {_one_line(e)}") from e

        # As Detectron2's detector_postprocess: boxes that rounding has left without area go.
        scale = np.array([width / resized.width, height / resized.height] * 2, np.float32)
        values["boxes"] = (values["boxes"] * scale).clip(0, [width, height] * 2, dtype=np.float32)
        if "deviations" in values:
            values["deviations"] *= scale
        if self.has_masks:
            values["masks"] = values["masks"][:, 0]
        kept = (values["boxes"][:, 2:] > values["boxes"][:, :2]).all(axis=1)
        kept &= values["scores"] >= score_threshold
        values = {name: value[kept] for name, value in values.items()}
        return Detections(names=[self.class_names[i] for i in values["classes"]], **values)

    def _resized(self, image: Image.Image) -> Image.Image:
        """As Detectron2's ResizeShortestEdge."""
        width, height = image.size
        if self.min_size == 0:
            return image
        scale = self.min_size / min(width, height)
        sides = [scale * width, scale * height]
        if max(sides) > self.max_size:
            scale = self.max_size / max(sides)
            sides = [scale * x for x in sides]
        return image.resize([max(int(x + 0.5), 1) for x in sides], Image.Resampling.BILINEAR)


def read_image(path: str | os.PathLike) -> Image.Image:
    """
    An image as Detectron2 reads it: RGB, turned as its EXIF data say.

    Raises:
        OnnxError: it cannot be read, or has values that 8 bits do not hold.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except OnnxError as e:
        raise OnnxError(f"{os.fspath(path)}: {e}") from e
    except Exception as e:  # a damaged file can make a decoder raise anything
        reason = "not an image" if isinstance(e, Image.UnidentifiedImageError) else _one_line(e)
        raise OnnxError(f"{os.fspath(path)}: {getattr(e, 'strerror', None) or reason}") from e


def _to_rgb(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not is_image or 0 in image.shape:
            raise OnnxError(
                f"an array of {image.dtype}, shape {image.shape}: must be uint8, (H, W, 3) or "
                "(H, W)"
            )
        image = Image.fromarray(image)
    if 0 in image.size:
        raise OnnxError(f"an image of {image.width}x{image.height} pixels: has no pixel")
    fault = _misread(image)
    if fault:
        raise OnnxError(f"{fault}: convert the image to 8 bits, values from 0 to 255")
    return ImageOps.exif_transpose(image).convert("RGB")


def _misread(image: Image.Image) -> str:
    """What the conversion to 8 bits would turn black or white without an error; "" if nothing."""
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        if not (0 <= low and high <= 255):
            return f"values from {low:g} to {high:g}"
        if image.mode == "F" and 0 < high < 16:
            return f"no value over {high:g}, where 255 is white"
    elif ";16" in str(getattr(image, "tile", "")):
        high = max(band[1] for band in image.convert("RGB").getextrema())
        if 0 < high < 16:
            return "16 bits, of which the upper 4 are empty"
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -- the command line ------------------------------------------------------------------------------


def draw(image: Image.Image, found: Detections) -> Image.Image:
    """A copy with the boxes, their names and scores."""
    picture = image.copy()
    pen = ImageDraw.Draw(picture)
    for box, score, name in zip(found.boxes.tolist(), found.scores, found.names):
        pen.rectangle(box, outline="red")
        pen.text((box[0] + 2, box[1]), f"{name} {score:.2f}", fill="red")
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cbbl_onnx", description="Find objects with an exported detector."
    )
    parser.add_argument("model", help="ONNX file of tools/export_model.py")
    parser.add_argument("image", nargs="+", help="image files")
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, metavar="SCORE", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each image")
    parser.add_argument("--pictures", metavar="DIR", help="draw the boxes, as PNG files in DIR")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all cores")
    args = parser.parse_args(argv)
    failed = False
    pictures = {
        path: os.path.join(
            args.pictures or "", os.path.splitext(os.path.basename(path))[0] + ".png"
        )
        for path in args.image
    }
    if args.pictures:
        _check_targets(pictures)
    try:
        detector = Detector(args.model, args.threads)
    except OnnxError as e:
        sys.exit(f"error: {e}")
    for path in args.image:
        try:
            image = read_image(path)
            found = detector(image, args.score_threshold)
        except OnnxError as e:
            print(f"skipped: {e}", file=sys.stderr)
            failed = True
            continue
        if args.json:
            print(json.dumps({"image": path, "detections": found.to_dicts()}))
        else:
            print(f"{path}: {len(found)} {'object' if len(found) == 1 else 'objects'}")
            for x in found.to_dicts():
                box = " ".join(f"{value:.1f}" for value in x["box"])
                deviations = " ".join(f"{value:.1f}" for value in x.get("deviations", ()))
                print(
                    f"  {x['name']} {x['score']:.3f}  {box}"
                    + f"  +- {deviations}" * bool(deviations)
                )
        if args.pictures:
            try:
                os.makedirs(args.pictures, exist_ok=True)
                draw(image, found).save(pictures[path])
            except OSError as e:
                sys.exit(f"error: {pictures[path]}: cannot be written ({e.strerror or e})")
    sys.exit(failed)


def _check_targets(pictures: dict[str, str]) -> None:
    """From the paths of images to those of their pictures: none may take the place of another."""
    taken = {os.path.realpath(path).lower(): path for path in pictures}
    for path, picture in pictures.items():
        other = taken.setdefault(os.path.realpath(picture).lower(), path)
        if other != path or os.path.realpath(picture) == os.path.realpath(path):
            what = "that image" if other == path else other
            sys.exit(
                f"error: --pictures: {picture}, the picture of {path}, would replace {what}"
                ", or its picture: choose another folder, or fewer images at a time"
            )


if __name__ == "__main__":
    main()
