"""
What a study keeps of its finished runs, for other machines and for good: a folder of small text
files that can be committed.

* ``runs.csv``: a line for each run: config, overrides, seed, the hash of all its settings and of
  the annotation files, commit, versions, threads, seconds of an iteration, all AP of the evaluation
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
import json
import math
import os
import platform
import shlex
import subprocess
import zlib
from typing import Dict, Iterator, List, Optional

import detectron2
import numpy as np
import torch
import yaml
from cbbl_d2.config import add_cbbl_config
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.bootstrap import bootstrap_ap
from cbbl_d2.evaluation.coco import prepare_ground_truth
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

# They differ between runs of one kind, or between machines.
_NO_SETTING = ("SEED", "OUTPUT_DIR", "MODEL.DEVICE")
_KEYS = (
    *("run", "config", "overrides", "seed", "settings", "evaluations", "annotations", "weights"),
    *("commit", "versions", "device", "threads", "s/iteration"),
)


# -- settings --------------------------------------------------------------------------------------


def flatten(node: Dict, prefix: str = "") -> Dict[str, object]:
    """Dotted config key -> value, from nested mappings."""
    flat: Dict[str, object] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@functools.cache
def flat_settings(text: str) -> Dict[str, object]:
    """Dotted config key -> value, from a config as YAML, without what is no setting of a run."""
    return {k: v for k, v in flatten(yaml.safe_load(text)).items() if k not in _NO_SETTING}


def changed_settings(before: str, now: str) -> List[str]:
    """
    What differs between two configs as YAML: ``"KEY value"`` of the second one. A key that is
    younger than the first one acted there as its default does.
    """
    old, new, defaults = map(flat_settings, (before, now, _defaults()))
    return [f"{key} {v}" for key, v in new.items() if old.get(key, defaults.get(key)) != v]


@functools.cache
def _defaults() -> str:
    cfg = get_cfg()
    add_cbbl_config(cfg)
    return cfg.dump()


def short_hash(content) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:12]


def settings_hash(settings: str) -> str:
    return short_hash(flat_settings(settings))


# -- records ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """A finished run, as ``runs.csv`` has it."""

    fields: Dict[str, str]
    metrics: Dict[str, float]
    bootstrap: Dict[str, np.ndarray]
    """Metric -> AP on each resample."""
    missing: List[str] = dataclasses.field(default_factory=list)
    """Further evaluations of the study that were not made, or with other overrides."""


class StudyRecords:
    """The records in one folder, for the studies that name it as their ``results``."""

    are_all = False  # a run that is not among them may be finished in its folder

    def __init__(self, folder: str):
        """
        Raises:
            UserError: a file in it is damaged.
        """
        self.folder = folder
        self._rows = self._read("runs.csv")
        self._known_settings: Dict[str, str] = {}
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
                    if k not in _KEYS and v not in ("", None) and k.split("/")[0] not in missing
                }
                metrics["time"] = float(row["s/iteration"] or math.nan)
                return Record(row, metrics, self._vectors.get(_identity(row), {}), missing)
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
        return list(dict.fromkeys(r.name for r, x in found if x and x.fields["commit"] != now))

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
        row = {
            "run": run.name,
            "config": run.config,
            "overrides": shlex.join(run.overrides),
            "seed": str(run.seed),
            "settings": settings_hash(run.settings),
            "evaluations": json.dumps(_evaluations(run)),
            "annotations": annotations_hash(run.cfg),
            "weights": _weights_hash(run.cfg),
            "commit": commit(),
            "versions": versions(),
            "device": _device(run.cfg.MODEL.DEVICE),
            "threads": str(threads),
            "s/iteration": f"{results.get('time', math.nan):.3f}",
            **{k: f"{v:.4g}" if "gradients/" in k else f"{v:.3f}" for k, v in _kept(results)},
        }
        vectors = _bootstrap(run.cfg, run.cfg.DATASETS.TEST, folder)
        with self._locked():
            self._write_settings(run)
            others = [r for r in self._read("bootstrap.csv") if _identity(r) != _identity(row)]
            self._write("bootstrap.csv", others + _as_rows(row, vectors))
            # Last: with this line the run is recorded.
            others = [r for r in self._read("runs.csv") if _identity(r) != _identity(row)]
            self._rows = others + [row]
            self._write("runs.csv", self._rows)
        self._vectors[_identity(row)] = vectors

    def seal(self, run, test_set: str, results: Dict[str, float], folder: str) -> None:
        """Keep what a run achieves on the test set, not to be read in passing."""
        vectors = {k: v.tolist() for k, v in _bootstrap(run.cfg, [test_set], folder).items()}
        content = {"metrics": dict(_kept(results)), "bootstrap": vectors}
        sealed = base64.b85encode(zlib.compress(json.dumps(content).encode())).decode()
        row = {"run": run.name, "seed": str(run.seed), "settings": settings_hash(run.settings)}
        with self._locked():
            self._write_settings(run)
            row["test_set"] = test_set
            rows = [r for r in self._read("test.csv") if not _same_test(r, row)]
            self._write("test.csv", [*rows, {**row, "sealed": sealed}])

    def is_sealed(self, run, test_set: str) -> bool:
        """Whether what a run achieves on a test set is kept."""
        return self._sealed_row(run, test_set) is not None

    def open_test(self, run, test_set: str) -> Optional[Record]:
        """
        What a run achieves on the test set. Written, readable, to ``opened_test.csv``: that it has
        been looked at is part of the record.
        """
        row = self._sealed_row(run, test_set)
        if row is None:
            return None
        try:
            content = json.loads(zlib.decompress(base64.b85decode(row["sealed"])))
        except (ValueError, zlib.error) as e:
            raise UserError(f"{self._path('test.csv')}: the line of {row['run']} is damaged") from e
        metrics = {k: float(v) for k, v in content["metrics"].items()}
        opened = {k: v for k, v in row.items() if k != "sealed"}
        opened.update({k: f"{v:.3f}" for k, v in metrics.items()})
        with self._locked():
            rows = [r for r in self._read("opened_test.csv") if not _same_test(r, row)]
            self._write("opened_test.csv", [*rows, opened])
        return Record(row, metrics, {k: np.array(v) for k, v in content["bootstrap"].items()})

    def _sealed_row(self, run, test_set: str) -> Optional[Dict[str, str]]:
        for row in self._read("test.csv"):
            here = (row["seed"], row["test_set"]) == (str(run.seed), test_set)
            if here and not changed_settings(self._settings(row["settings"]), run.settings):
                return row
        return None

    def _check_files(self, row: Dict[str, str], run) -> None:
        here = annotations_hash(run.cfg)
        if here and row["annotations"] and here != row["annotations"]:
            raise UserError(
                f"{self._path('runs.csv')}: {row['run']}, seed {row['seed']}, is of other "
                f"annotation files than those of {listed(_test_and_train(run.cfg))} here: convert "
                "or download them again, or take its line out"
            )
        here = _weights_hash(run.cfg)
        if here and row.get("weights") and here != row["weights"]:
            raise UserError(
                f"{self._path('runs.csv')}: {row['run']}, seed {row['seed']}, started from other "
                f"weights than {run.cfg.MODEL.WEIGHTS} here: make or download them again, or take "
                "its line out"
            )

    def _write_settings(self, run) -> None:
        path = self._path(f"settings/{settings_hash(run.settings)}.yaml")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as f:
            f.write(yaml.safe_dump(_nested(flat_settings(run.settings))))

    def _settings(self, name: str) -> str:
        if name in self._known_settings:
            return self._known_settings[name]
        path = self._path(f"settings/{name}.yaml")
        try:
            with open(path) as f:
                return self._known_settings.setdefault(name, f.read())
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

    def _write(self, name: str, rows: List[Dict[str, str]]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        try:
            with atomic_write(self._path(name)) as f:
                f.write(text.getvalue())
        except OSError as e:
            raise UserError(f"{self._path(name)}: cannot be written: {e.strerror}") from e

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two studies may share the folder."""
        os.makedirs(self.folder, exist_ok=True)
        with open(self._path(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _identity(row: Dict[str, str]) -> tuple:
    return row["run"], row["seed"], row["settings"]


def _same_test(row: Dict[str, str], other: Dict[str, str]) -> bool:
    return (*_identity(row), row["test_set"]) == (*_identity(other), other["test_set"])


def _evaluations(run) -> Dict[str, str]:
    """Name of each further evaluation -> hash of what it changes."""
    return {e.evaluation: short_hash(e.options) for e in run.evaluations}


def _as_rows(row: Dict[str, str], vectors: Dict[str, np.ndarray]) -> List[Dict[str, str]]:
    key = dict(zip(("run", "seed", "settings"), _identity(row)))
    return [
        {**key, "metric": metric, "values": " ".join(f"{v:.2f}" for v in values)}
        for metric, values in vectors.items()
    ]


def _kept(results: Dict[str, float]):
    """AP of all kinds, by class too, and gradients."""
    return [(k, v) for k, v in sorted(results.items()) if "/AP" in k or k.startswith("gradients/")]


def _nested(flat: Dict[str, object]) -> Dict:
    nested: Dict = {}
    for key, value in flat.items():
        *nodes, last = key.split(".")
        node = nested
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    return nested


def _bootstrap(cfg: CfgNode, test_sets, folder: str) -> Dict[str, np.ndarray]:
    """Empty for what is no single data set with annotation file, or has no boxes to resample."""
    path = os.path.join(folder, "inference", "coco_instances_results.json")
    json_file = MetadataCatalog.get(test_sets[0]).get("json_file") if len(test_sets) == 1 else None
    if not json_file or not os.path.isfile(path):
        return {}
    rules = MetadataCatalog.get(test_sets[0]).get("evaluation_rules")
    with open(path) as f, contextlib.redirect_stdout(io.StringIO()):
        detections = [d for d in json.load(f) if "bbox" in d]
        truth = COCO(json_file)
    prepare_ground_truth(test_sets[0], truth)
    limit = (rules and rules.max_detections) or max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
    vectors = bootstrap_ap(truth, detections, max_detections=limit)
    # Of a benchmark APs may be another range.
    other = {f"bbox/{metric.name}" for metric in (rules.size_metrics if rules else ())}
    return {name: values for name, values in vectors.items() if name not in other}


# -- where and with what ---------------------------------------------------------------------------


def _test_and_train(cfg: CfgNode) -> List[str]:
    return [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]


def annotations_hash(cfg: CfgNode) -> str:
    """Of the annotation files to train and evaluate on; "" where one is not there."""
    digest = hashlib.sha256()
    for name in _test_and_train(cfg):
        json_file = MetadataCatalog.get(name).get("json_file")
        if not json_file or not os.path.isfile(json_file):
            return ""
        with open(json_file, "rb") as f:
            digest.update(f.read())
    return digest.hexdigest()[:12]


def _weights_hash(cfg: CfgNode) -> str:
    """Of the file that a training starts from; "" for none, or one that is not here."""
    if not os.path.isfile(cfg.MODEL.WEIGHTS):
        return ""
    with open(cfg.MODEL.WEIGHTS, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:12]


def commit() -> str:
    """Of the checkout that this package is in, with a "+" where files differ from it."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        head, changes = (
            subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short=10", "HEAD"),
                # Of the code that trains; results and docs change with every run.
                ("status", "--porcelain", "-uno", "--", ":/cbbl_d2", ":/configs", ":/train_net.py"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def versions() -> str:
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"detectron2 {detectron2.__version__}"
    )


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device
