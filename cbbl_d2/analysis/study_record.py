"""
What a study keeps of its finished runs, for other machines and for good: a folder of small text
files that can be committed.

* ``runs.csv``: a line for each run: config, overrides, seed, the hash of all its settings and of
  the annotation files, commit, versions, threads, iterations that were trained (fewer than the
  config's where it has stopped early), seconds of an iteration, all AP of the evaluation
  data set, of each further evaluation (``voting/bbox/AP``), and the gradients by object size.
* ``settings/{hash}.yaml``: the whole config of a run but for its seed and its output folder.
* ``bootstrap.csv``: AP on resampled images, see :func:`cbbl_d2.evaluation.bootstrap.bootstrap_ap`.
* ``test.csv``: what was measured on the test set in the same go, encoded so that nobody reads it in
  passing; ``opened_test.csv``: the same, once it has been opened.

A run is in it when it is finished and evaluated, or not at all.
"""

import base64
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import zlib
from typing import Dict, Iterable, List, Optional

import detectron2
import numpy as np
import torch
import yaml
from cbbl_d2.devices import device_title
from cbbl_d2.engine import load_config
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.bootstrap import bootstrap_ap
from cbbl_d2.evaluation.coco import prepare_ground_truth
from cbbl_d2.files import open_whole
from cbbl_d2.messages import listed
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

_KEYS = (
    *("run", "config", "overrides", "seed", "settings", "evaluations", "annotations", "weights"),
    *("commit", "versions", "device", "threads", "iterations", "s/iteration"),
)
# Of these columns there is one row in ``runs.csv``.
_IDENTITY = ("run", "seed", "settings")
_TRAINING = ("commit", "versions", "device", "threads", "s/iteration")


# -- settings --------------------------------------------------------------------------------------


def flatten(node: Dict, prefix: str = "") -> Dict[str, object]:
    """Dotted config key -> value, from nested mappings."""
    flat: Dict[str, object] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def parse_settings(text: str) -> Dict:
    """A config as YAML, without what differs between runs of one kind, or between machines."""
    settings = yaml.safe_load(text)
    model = settings.get("MODEL", {})
    for node, key in ((settings, "SEED"), (settings, "OUTPUT_DIR"), (model, "DEVICE")):
        node.pop(key, None)
    return settings


@functools.cache
def flat_settings(text: str) -> Dict[str, object]:
    """Dotted config key -> value, of :func:`parse_settings`."""
    return flatten(parse_settings(text))


def changed_settings(before: str, now: str) -> List[str]:
    """
    What differs between two configs as YAML: ``"KEY value"`` of the second one. A key that is
    younger than the first one acted there as its default does.
    """
    old = {**_defaults(), **flat_settings(before)}
    return [f"{key} {v}" for key, v in flat_settings(now).items() if old.get(key) != v]


@functools.cache
def _defaults() -> Dict[str, object]:
    return flat_settings(load_config("").dump())


def short_hash(content) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:12]


def settings_hash(settings: str) -> str:
    return short_hash(flat_settings(settings))


# -- records ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """What was measured of a finished run."""

    metrics: Dict[str, float]
    bootstrap: Dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Metric -> AP on each of the same resamples of images; empty where none is on record."""
    commit: str = ""
    missing: List[str] = dataclasses.field(default_factory=list)
    """Further evaluations of the study that were not made, or with other overrides."""


class StudyRecords:
    """The records in one folder, for the studies that name it as their ``results``."""

    def __init__(self, folder: str):
        """
        Raises:
            UserError: a file in it is damaged.
        """
        self.folder = folder
        self._rows = self._read("runs.csv")
        self._settings = functools.cache(self._read_settings)
        self._checked = set()  # rows whose files were compared: a table asks for each many times
        self._vectors: Dict[tuple, Dict[str, np.ndarray]] = {}
        for row in self._read("bootstrap.csv"):
            values = np.array([float(x) for x in row["values"].split()])
            self._vectors.setdefault(_identity(row), {})[row["metric"]] = values

    def find(self, run) -> Optional[Record]:
        """
        Args:
            run: a :class:`cbbl_d2.analysis.study.Run`.

        Returns:
            the record of a run of the same settings and seed, by whatever name.

        Raises:
            UserError: a run of this name and seed has other settings, or was trained or evaluated
                with other annotation files than are here.
        """
        for row in sorted(self._rows, key=lambda row: row["run"] != run.name):
            if row["seed"] != str(run.seed):
                continue
            changed = changed_settings(self._settings(row["settings"]), run.settings)
            if not changed:
                if _identity(row) not in self._checked:
                    self._check_files(row, run)
                    self._checked.add(_identity(row))
                made = json.loads(row.get("evaluations") or "{}")
                missing = [k for k, v in _evaluations(run).items() if made.get(k) != v]
                metrics = {
                    k: float(v)
                    for k, v in row.items()
                    if v and k not in _KEYS and k.split("/")[0] not in missing
                }
                metrics["time"] = float(row["s/iteration"] or math.nan)
                vectors = self._vectors.get(_identity(row), {})
                return Record(metrics, vectors, row["commit"], missing)
            if row["run"] == run.name:
                raise UserError(
                    f"{self._path('runs.csv')}: {run.name}, seed {run.seed}, was trained with "
                    f"other settings, which now are {listed(changed)}: give the run another name, "
                    "or take its line out"
                )
        return None

    def other_commits(self, runs) -> List[str]:
        """Names of the runs whose records are of other commits than the one checked out."""
        now = commit()
        found = ((run, self.find(run)) for run in runs)
        return list(dict.fromkeys(r.name for r, x in found if x and x.commit != now))

    def add(self, run, results: Dict[str, float], folder: str, threads: int) -> None:
        """
        Record a finished run.

        Args:
            run: it.
            results: metric -> value, of all its evaluations; only AP and gradients are kept.
            folder: of the evaluation whose detections are resampled.
            threads: of its process.

        Raises:
            UserError: the folder cannot be written to.
        """
        cfg = run.cfg
        device = cfg.MODEL.DEVICE
        row = {
            "run": run.name,
            "config": run.config,
            "overrides": shlex.join(run.overrides),
            "seed": str(run.seed),
            "settings": settings_hash(run.settings),
            "evaluations": json.dumps(_evaluations(run)),
            "annotations": annotations_hash(cfg),
            "weights": _files_hash([cfg.MODEL.WEIGHTS]),
            "commit": commit(),
            "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
            f"detectron2 {detectron2.__version__}",
            "device": device_title(device),
            "threads": str(threads),
            "iterations": str(run.iterations),
            "s/iteration": f"{results.get('time', math.nan):.3f}",
        }
        for name, value in _kept(results).items():
            row[name] = f"{value:.4g}" if "gradients/" in name else f"{value:.3f}"
        before = self._rows_of(run)
        if before:  # what has been made up for is an evaluation: the training stays what it was
            row |= {k: before[0][k] for k in ("settings", *_TRAINING) if before[0].get(k)}
        key = {column: row[column] for column in _IDENTITY}
        vectors = _bootstrap(cfg, cfg.DATASETS.TEST, folder)
        vector_rows = [
            {**key, "metric": metric, "values": " ".join(f"{v:.2f}" for v in values)}
            for metric, values in vectors.items()
        ]
        self._write_settings(run)
        self._replace("bootstrap.csv", key, vector_rows)
        # Last: with this line the run is recorded.
        self._rows = self._replace("runs.csv", key, [row])
        self._vectors[_identity(row)] = vectors

    def seal(self, run, test_set: str, results: Dict[str, float], folder: str) -> None:
        """Keep what a run achieves on the test set, not to be read in passing."""
        vectors = {k: v.tolist() for k, v in _bootstrap(run.cfg, [test_set], folder).items()}
        content = {"metrics": _kept(results), "bootstrap": vectors}
        sealed = base64.b85encode(zlib.compress(json.dumps(content).encode())).decode()
        before = [*self._rows_of(run), *self._rows_of(run, "test.csv")]
        settings = before[0]["settings"] if before else settings_hash(run.settings)
        key = dict(zip(_IDENTITY, (run.name, str(run.seed), settings)))
        key["test_set"] = test_set
        self._write_settings(run)
        self._replace("test.csv", key, [{**key, "sealed": sealed}])

    def open_test(self, run, test_set: str) -> Optional[Record]:
        """
        What a run achieves on the test set. Written, readable, to ``opened_test.csv``: that it has
        been looked at is part of the record.
        """
        row = self.find_sealed(run, test_set)
        if row is None:
            return None
        try:
            content = json.loads(zlib.decompress(base64.b85decode(row["sealed"])))
        except (ValueError, zlib.error) as e:
            raise UserError(f"{self._path('test.csv')}: the line of {row['run']} is damaged") from e
        metrics = {k: float(v) for k, v in content["metrics"].items()}
        key = {k: v for k, v in row.items() if k != "sealed"}
        opened = {**key, **{k: f"{v:.3f}" for k, v in metrics.items()}}
        self._replace("opened_test.csv", key, [opened])
        return Record(metrics, {k: np.array(v) for k, v in content["bootstrap"].items()})

    def find_sealed(self, run, test_set: str) -> Optional[Dict[str, str]]:
        """The line of ``test.csv`` that keeps what a run achieves on a test set."""
        for row in self._read("test.csv"):
            here = (row["seed"], row["test_set"]) == (str(run.seed), test_set)
            if here and not changed_settings(self._settings(row["settings"]), run.settings):
                return row
        return None

    def _check_files(self, row: Dict[str, str], run) -> None:
        cfg = run.cfg
        data_sets = listed([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        annotations = f"is of other annotation files than those of {data_sets} here: convert"
        weights = f"started from other weights than {cfg.MODEL.WEIGHTS} here: make"
        for column, here, what in (
            ("annotations", annotations_hash(cfg), annotations),
            ("weights", _files_hash([cfg.MODEL.WEIGHTS]), weights),
        ):
            if here and row.get(column) and here != row[column]:
                raise UserError(
                    f"{self._path('runs.csv')}: {row['run']}, seed {row['seed']}, {what} or "
                    "download them again, or take its line out"
                )

    def _rows_of(self, run, name: str = "runs.csv") -> List[Dict[str, str]]:
        """The lines of a run in a file: with its settings, whose younger keys they may lack."""
        return [
            row
            for row in self._read(name)
            if (row["run"], row["seed"]) == (run.name, str(run.seed))
            and not changed_settings(self._settings(row["settings"]), run.settings)
        ]

    def _write_settings(self, run) -> None:
        if self._rows_of(run):  # they name a file already
            return
        with open_whole(self._path(f"settings/{settings_hash(run.settings)}.yaml")) as f:
            f.write(yaml.safe_dump(parse_settings(run.settings)))

    def _read_settings(self, name: str) -> str:
        path = self._path(f"settings/{name}.yaml")
        try:
            with open(path) as f:
                return f.read()
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); runs.csv names it") from e

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _read(self, name: str) -> List[Dict[str, str]]:
        try:
            with open(self._path(name), newline="") as f:
                rows = list(csv.DictReader(f))
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{self._path(name)}: cannot be read: {e}") from e
        for number, row in enumerate(rows, start=2):
            if None in row or not (row.get("run") and row.get("seed") and row.get("settings")):
                raise UserError(f"{self._path(name)}: line {number} is damaged: take it out")
        return rows

    def _replace(
        self, name: str, key: Dict[str, str], rows: List[Dict[str, str]]
    ) -> List[Dict[str, str]]:
        """Put rows into the place of those that agree with ``key``; returns all of the file."""
        os.makedirs(self.folder, exist_ok=True)
        with open(self._path(".lock"), "w") as lock:  # two studies may share the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [r for r in self._read(name) if not key.items() <= r.items()] + rows
            with open_whole(self._path(name)) as f:
                columns = list(dict.fromkeys(itertools.chain(*rows)))
                writer = csv.DictWriter(f, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        return rows


def _identity(row: Dict[str, str]) -> tuple:
    return tuple(row[column] for column in _IDENTITY)


def _evaluations(run) -> Dict[str, str]:
    """Name of each further evaluation -> hash of what it changes."""
    own = len(run.overrides)
    return {e.evaluation: short_hash(e.overrides[own:]) for e in run.evaluations}


def _kept(results: Dict[str, float]) -> Dict[str, float]:
    """AP of all kinds, by class too, and gradients."""
    return {k: v for k, v in sorted(results.items()) if "/AP" in k or k.startswith("gradients/")}


def _bootstrap(cfg: CfgNode, test_sets, folder: str) -> Dict[str, np.ndarray]:
    """Empty for what is no single data set with annotation file, or has no boxes to resample."""
    path = os.path.join(folder, "inference", "coco_instances_results.json")
    json_files = [MetadataCatalog.get(name).get("json_file") for name in test_sets]
    if len(json_files) != 1 or not json_files[0] or not os.path.isfile(path):
        return {}
    rules = MetadataCatalog.get(test_sets[0]).get("evaluation_rules")
    with open(path) as f, contextlib.redirect_stdout(io.StringIO()):
        detections = [d for d in json.load(f) if "bbox" in d]
        truth = COCO(json_files[0])
    prepare_ground_truth(test_sets[0], truth)
    limit = (rules and rules.max_detections) or max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
    vectors = bootstrap_ap(truth, detections, max_detections=limit)
    # Of a benchmark APs may be another range.
    other = {f"bbox/{metric.name}" for metric in (rules.size_metrics if rules else ())}
    return {name: values for name, values in vectors.items() if name not in other}


# -- where and with what ---------------------------------------------------------------------------


def annotations_hash(cfg: CfgNode) -> str:
    """Of the annotation files to train and evaluate on; "" where one is not there."""
    data_sets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    return _files_hash(MetadataCatalog.get(name).get("json_file") or "" for name in data_sets)


def _files_hash(paths: Iterable[str]) -> str:
    """Of the files together; "" where one is not here, or has no name."""
    digest = hashlib.sha256()
    for path in paths:
        if not os.path.isfile(path):
            return ""
        with open(path, "rb") as f:
            digest.update(f.read())
    return digest.hexdigest()[:12]


def commit() -> str:
    """Of the checkout that this package is in, with a "+" where files differ from it."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    # The code that trains; results and docs change with every run.
    code = [":/cbbl_d2", ":/configs", ":/train_net.py"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        head = run([*git, "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        changes = run([*git, "status", "--porcelain", "-uno", "--", *code]).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")
