"""
What a study consists of, and what of it is done. A study is a YAML file:

    output: output/studies/losses   # folder of the study, in the working directory
    seeds: [1, 2, 3]
    overrides: [SOLVER.MAX_ITER, 800]   # of every run; optional
    metrics: [bbox/AP, bbox/APvs]       # columns of the table; optional
    baseline: smooth_l1                 # the run that others are compared with; optional
    results: docs/results/losses        # folder of small files to commit, which hold what was
                                        # measured; default: results in the output folder
    evaluations:                        # further ones of each finished run; optional
      voting: [MODEL.CBBL.VOTING_SIGMA, 0.05]   # columns voting/bbox/AP ...
    test_set: small_shapes_test         # evaluated along, kept unread until --open-test; optional
    runs:
      smooth_l1: configs/SmallShapes/smooth_l1.yaml
      cbbl: configs/SmallShapes/cbbl.yaml
      cbbl_heavy:
        config: configs/SmallShapes/cbbl.yaml
        overrides: [MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT, 1.0]
        baseline: cbbl                  # instead of the study's
        evaluations: {}                 # instead of the study's
"""

import contextlib
import dataclasses
import json
import os
import statistics
from typing import Dict, List, Optional, Sequence, Tuple

import yaml
from cbbl_d2.data.coco_format import register_from_config
from cbbl_d2.data.dataset_checks import check_registered
from cbbl_d2.engine import load_config
from cbbl_d2.engine.hooks import STOPPED_EARLY
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import AP_COLUMNS
from cbbl_d2.messages import listed
from cbbl_d2.yaml_checks import check_yaml
from detectron2.config import CfgNode

from .study_record import Record, StudyRecords, short_hash

_OPTIONAL = {"overrides", "metrics", "baseline", "results", "evaluations", "test_set"}
# The folder, in that of a run, of the evaluation that nobody is to read yet.
SEALED = "sealed"
METRICS = tuple(f"bbox/{column}" for column in AP_COLUMNS[:4])


def read_metrics(folder: str) -> List[Dict]:
    """
    The lines of ``metrics.json`` in the folder of a training, in the order in which they were
    written; none where there is no such file. A line that is being written, or was cut off by a
    kill, is left out.
    """
    path = os.path.join(folder, "metrics.json")
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as f:
        for text in f:
            with contextlib.suppress(json.JSONDecodeError, RecursionError):
                lines.append(json.loads(text))
    return [x for x in lines if isinstance(x, dict) and isinstance(x.get("iteration"), int)]


def stopped_early_after(lines: Sequence[Dict]) -> Optional[int]:
    """
    The number of iterations of a training that ``SOLVER.EARLY_STOPPING`` has ended; None of one
    that it has not, or that was trained on since.

    Args:
        lines: of its ``metrics.json``, in their order.
    """
    stops = [int(line[STOPPED_EARLY]) for line in lines if STOPPED_EARLY in line]
    if not stops or any(line["iteration"] > stops[-1] for line in lines):
        return None
    return stops[-1]


@dataclasses.dataclass(frozen=True)
class Run:
    """
    One training: a config with one seed. Or, with ``evaluation``, one more evaluation of its last
    checkpoint.
    """

    name: str
    config: str
    seed: int
    overrides: Tuple[str, ...]
    folder: str
    max_iter: int
    settings: str  # the whole config, as YAML
    evaluations: Tuple["Run", ...] = ()
    evaluation: str = ""
    trained_in: str = ""  # of an evaluation: the folder of the training

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def cfg(self) -> CfgNode:
        cfg = load_config(self.config, list(self.overrides))
        register_from_config(cfg)
        return cfg

    @property
    def weights(self) -> str:
        """The last checkpoint of the training."""
        return os.path.join(self.trained_in or self.folder, "model_final.pth")

    def evaluated(self, folder: str, overrides: Sequence[str], name: str = "") -> "Run":
        """
        The evaluation of its last checkpoint with some keys changed.

        Args:
            folder: in its own.
            name: of the evaluation; by default that of the folder.
        """
        return dataclasses.replace(
            self,
            folder=os.path.join(self.folder, folder),
            overrides=(*self.overrides, *overrides),
            evaluations=(),
            evaluation=name or folder,
            trained_in=self.trained_in or self.folder,
        )

    def sealed(self, test_set: str) -> "Run":
        """Its evaluation, and its further ones, on the data set that nobody is to read yet."""
        there = on_test_set(test_set)
        further = tuple(e.evaluated(SEALED, there, e.evaluation) for e in self.evaluations)
        return dataclasses.replace(self.evaluated(SEALED, there), evaluations=further)

    def last_iteration(self) -> int:
        """Number of iterations that ``metrics.json`` tells of; 0 before the first lines."""
        return max((line["iteration"] + 1 for line in self._lines()), default=0)

    @property
    def iterations(self) -> int:
        """Number of iterations of the finished training: fewer where it has stopped early."""
        return stopped_early_after(read_metrics(self.trained_in or self.folder)) or self.max_iter

    def results(self) -> Optional[Dict[str, float]]:
        """
        The metrics of the evaluation after the last iteration, with the median ``time`` of an
        iteration in seconds; None while the run is not finished.
        """
        if not os.path.isfile(self.weights):
            return None
        lines, iterations = self._lines(), self.iterations
        # Only an evaluation has keys like bbox/AP. Its line bears the last iteration, counted
        # from 0, or the number of iterations if it was made up for on resume.
        final = [
            line
            for line in lines
            if line["iteration"] >= iterations - 1 and any("/AP" in key for key in line)
        ]
        if not final:
            return None
        # A training that stops early has evaluated already when test-time augmentation comes.
        results = {k: v for line in final for k, v in line.items() if isinstance(v, (int, float))}
        times = [line["time"] for line in lines if "time" in line]
        return {**results, "time": statistics.median_high(times)} if times else results

    def all_results(self) -> Optional[Dict[str, float]]:
        """
        :meth:`results` with those of its further evaluations as ``voting/bbox/AP``; None if one of
        them is not finished.
        """
        results = self.results()
        for evaluation in self.evaluations:
            more = evaluation.results()
            if results is None or more is None:
                return None
            results.update({f"{evaluation.evaluation}/{k}": more[k] for k in more if "/AP" in k})
        return results

    def _lines(self) -> List[Dict]:
        # train_net.py --eval-only writes into the second one.
        return read_metrics(os.path.join(self.folder, "inference" if self.evaluation else ""))


@dataclasses.dataclass(frozen=True)
class Study:
    """
    Attributes:
        runs: in the order of the file, seeds innermost.
        baselines: for each name of a run the name of the run that it is compared with.
        records: of the finished runs, here and on other machines.
        test_set: what is evaluated along and kept unread, or "".
        opened_test: name and seed of a run -> what was kept unread, once it has been opened: then
            the study has nothing else.
    """

    output: str
    metrics: List[str]
    runs: List[Run]
    baselines: Dict[str, str]
    records: StudyRecords
    test_set: str
    opened_test: Optional[Dict[Tuple[str, int], Record]] = None

    @property
    def names(self) -> List[str]:
        return list(dict.fromkeys(run.name for run in self.runs))

    def measured(self, run: Run) -> Optional[Record]:
        """
        What is on record of a run, or stands in its folder, and that of its further evaluations,
        whose metrics begin with their name. None while it is not finished.
        """
        if self.opened_test is not None:
            return self.opened_test.get((run.name, run.seed))
        record = self.records.find(run)
        results = None if record else run.all_results()
        return Record(results) if results else record

    def results(self, run: Run) -> Optional[Dict[str, float]]:
        """The metrics of :meth:`measured`."""
        record = self.measured(run)
        return record and record.metrics

    def evaluated_on(self, test_set: str) -> "Study":
        """
        The same study, with what its trainings achieve on another data set. Results are kept in a
        folder of that name in each run's folder, and in the study's.

        Raises:
            UserError: a run is not finished; the data set's name is none for a folder.
        """
        _check_folder_name("--evaluate-on", test_set)
        unfinished = [r for r in self.runs if r.results() is None]
        elsewhere = [r for r in unfinished if self.records.find(r)]
        if elsewhere:
            raise UserError(
                f"{self.output}: {len(elsewhere)} runs are on record, but their weights are not "
                "here: --evaluate-on needs the machine that trained them, or their folders"
            )
        if unfinished:
            raise UserError(
                f"{self.output}: to be evaluated on {test_set} all runs have to be finished, and "
                f"{listed(unfinished)} {'is' if len(unfinished) == 1 else 'are'} not: run the "
                "study without --evaluate-on first"
            )
        output = os.path.join(self.output, test_set)
        return dataclasses.replace(
            self,
            output=output,
            runs=[r.evaluated(test_set, on_test_set(test_set)) for r in self.runs],
            records=StudyRecords(os.path.join(output, "results")),
            test_set="",
        )

    def opened(self) -> "Study":
        """
        The same study, with what was measured on its test set and kept unread.

        Raises:
            UserError: it has no test set, or nothing is kept of it yet.
        """
        if not self.test_set:
            raise UserError(f"{self.output}: --open-test: the study has no key test_set")
        opened = {(r.name, r.seed): self.records.open_test(r, self.test_set) for r in self.runs}
        if not any(opened.values()):
            raise UserError(
                f"{self.output}: --open-test: no run has been evaluated on {self.test_set} yet"
            )
        output = os.path.join(self.output, self.test_set)
        return dataclasses.replace(self, output=output, opened_test=opened)


def on_test_set(test_set: str) -> Tuple[str, str]:
    """The overrides that evaluate on a data set."""
    return "DATASETS.TEST", f"('{test_set}',)"


def load_study(path: str) -> Study:
    """
    Raises:
        UserError: no such file, not valid YAML, a key that is unknown, missing or of the wrong
            kind; or a config with an error of its own.
    """
    check_yaml(path, plain_keys=False)
    try:
        with open(path, encoding="utf-8") as f:
            content = yaml.safe_load(f)
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    _check_keys(path, content, {"output", "seeds", "runs"}, _OPTIONAL)

    for key in ("output", "results", "test_set"):
        if content.get(key) is not None and not isinstance(content[key], str):
            raise UserError(f"{path}: {key} = {content[key]!r}: must be a name")
    output = content["output"]
    if not output:
        raise UserError(f"{path}: output is empty: name a folder")
    for key in ("output", "results"):
        # Somebody else's file may not choose what is overwritten.
        if os.path.relpath(content.get(key) or ".").split(os.sep)[0] == os.pardir:
            raise UserError(
                f"{path}: {key} = {content[key]!r}: must lie in the working directory, "
                f"{os.getcwd()}: start it elsewhere, or name a link to a folder"
            )
    test_set = content.get("test_set") or ""
    if test_set:
        _check_folder_name(f"{path}: test_set", test_set)
    seeds = content["seeds"]
    if not (isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)):
        raise UserError(f"{path}: seeds = {seeds!r}: must be a list of whole numbers >= 0")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{path}: seeds = {seeds!r}: each may come once")
    if not (isinstance(content["runs"], dict) and content["runs"]):
        raise UserError(f"{path}: runs must map names to config files")

    common = _words(path, "overrides", content.get("overrides"))
    names = [str(name) for name in content["runs"]]
    runs, baselines = [], {}
    for name, entry in content["runs"].items():
        name, entry = str(name), {"config": entry} if isinstance(entry, str) else entry
        _check_folder_name(f"{path}: run", name)
        optional = {"overrides", "baseline", "evaluations"}
        _check_keys(f"{path}: run {name}", entry, {"config"}, optional)
        config = str(entry["config"])
        overrides = common + _words(path, "overrides", entry.get("overrides"))
        cfg = load_config(config, overrides)
        register_from_config(cfg)
        if test_set:
            check_registered(test_set, f"{path}: test_set")
        evaluations = _evaluations(path, entry.get("evaluations", content.get("evaluations")))
        for words in evaluations.values():
            load_config(config, overrides + words)  # what is wrong is said before any training
        for seed in seeds:
            folder = os.path.join(output, name, f"seed_{seed}")
            cfg.SEED, cfg.OUTPUT_DIR = seed, folder
            settings = cfg.dump()
            run = Run(name, config, seed, tuple(overrides), folder, cfg.SOLVER.MAX_ITER, settings)
            # The folder is that of these overrides: with others it is another evaluation.
            further = tuple(
                run.evaluated(f"{key}-{short_hash(words)}", words, key)
                for key, words in evaluations.items()
            )
            runs.append(dataclasses.replace(run, evaluations=further))
        baseline = entry.get("baseline", content.get("baseline"))
        if baseline is not None and str(baseline) not in names:
            raise UserError(
                f"{path}: baseline {baseline} of {name} is none of the runs ({listed(names)})"
            )
        if baseline is not None and str(baseline) != name:
            baselines[name] = str(baseline)
    metrics = _words(path, "metrics", content.get("metrics")) or list(METRICS)
    records = StudyRecords(content.get("results") or os.path.join(output, "results"))
    return Study(output, metrics, runs, baselines, records, test_set)


def _check_folder_name(where: str, name: str) -> None:
    if name in ("", os.curdir, os.pardir) or os.path.basename(name) != name:
        raise UserError(f"{where} {name!r}: must be a name for a folder, without {os.sep}")


def _evaluations(path: str, value) -> Dict[str, List[str]]:
    """Name -> overrides."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: evaluations = {value!r}: must map names to lists of overrides")
    for name in map(str, value):
        if name in (SEALED, "inference") or not name.isidentifier():
            raise UserError(f"{path}: evaluations: {name!r} cannot be a name: use letters")
    return {str(k): _words(path, f"evaluations.{k}", v) for k, v in value.items()}


def _words(path: str, key: str, value) -> List[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{path}: {key} = {value!r}: must be a list, such as [{value}]")
    return [str(word) for word in value]


def _check_keys(where: str, content, required: set, optional: set) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a mapping with the keys {listed(sorted(required))}")
    missing = sorted(required - set(content))
    if missing:
        raise UserError(f"{where}: lacks {listed(missing)}")
    unknown = sorted(str(key) for key in set(content) - required - optional)
    if unknown:
        raise UserError(
            f"{where}: unknown {listed(unknown)}; known are {listed(sorted(required | optional))}"
        )
