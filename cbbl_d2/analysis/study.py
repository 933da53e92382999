"""
What a study consists of, and what of it is done. A study is a YAML file:

    output: output/studies/losses   # folder of the study, relative to the working directory
    seeds: [1, 2, 3]
    overrides: [SOLVER.MAX_ITER, 800]   # of every run; optional
    metrics: [bbox/AP, bbox/APvs]       # columns of the table; optional
    baseline: smooth_l1                 # the run that others are compared with; optional
    runs:
      smooth_l1: configs/SmallShapes/smooth_l1.yaml
      cbbl: configs/SmallShapes/cbbl.yaml
      cbbl_heavy:
        config: configs/SmallShapes/cbbl.yaml
        overrides: [MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT, 1.0]
        baseline: cbbl                  # instead of the study's
"""

import dataclasses
import json
import os
from typing import Dict, List, Optional, Tuple

import yaml

from cbbl_d2.engine import load_config
from cbbl_d2.errors import UserError
from cbbl_d2.messages import listed

METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APvs")


def read_metrics(folder: str) -> List[Dict]:
    """
    The lines of ``metrics.json`` in the folder of a training, in the order in which they were
    written; none where there is no such file. A line that is being written, or was cut off by a
    kill, is left out.
    """
    lines = []
    try:
        with open(os.path.join(folder, "metrics.json")) as f:
            for text in f:
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("iteration"), int):
                    lines.append(line)
    except FileNotFoundError:
        pass
    return lines


@dataclasses.dataclass(frozen=True)
class Run:
    """
    One training: a config with one seed. Or, with ``test_set``, the evaluation of its last
    checkpoint on that data set.
    """

    name: str
    config: str
    seed: int
    overrides: Tuple[str, ...]
    folder: str
    max_iter: int
    settings: str  # the whole config, as YAML
    test_set: str = ""

    @property
    def weights(self) -> str:
        """The last checkpoint of the training."""
        trained_in = os.path.dirname(self.folder) if self.test_set else self.folder
        return os.path.join(trained_in, "model_final.pth")

    def last_iteration(self) -> int:
        """Number of iterations that ``metrics.json`` tells of; 0 before the first lines."""
        return max((line["iteration"] + 1 for line in self._lines()), default=0)

    def results(self) -> Optional[Dict[str, float]]:
        """
        The metrics of the evaluation after the last iteration, with the median ``time`` of an
        iteration in seconds; None while the run is not finished.
        """
        if not os.path.isfile(self.weights):
            return None
        lines = self._lines()
        # Only an evaluation has keys like bbox/AP. Its line bears the last iteration, counted
        # from 0, or the number of iterations if it was made up for on resume.
        final = [
            line
            for line in lines
            if line["iteration"] >= self.max_iter - 1 and any("/AP" in key for key in line)
        ]
        if not final:
            return None
        times = sorted(line["time"] for line in lines if "time" in line)
        results = {k: v for k, v in final[-1].items() if isinstance(v, (int, float))}
        return {**results, "time": times[len(times) // 2]} if times else results

    def _lines(self) -> List[Dict]:
        if self.test_set:  # where train_net.py --eval-only writes
            return read_metrics(os.path.join(self.folder, "inference"))
        return read_metrics(self.folder)


@dataclasses.dataclass(frozen=True)
class Study:
    """
    Attributes:
        runs: in the order of the file, seeds innermost.
        baselines: for each name of a run the name of the run that it is compared with.
    """

    output: str
    metrics: List[str]
    runs: List[Run]
    baselines: Dict[str, str]

    @property
    def names(self) -> List[str]:
        return list(dict.fromkeys(run.name for run in self.runs))

    def evaluated_on(self, test_set: str) -> "Study":
        """
        The same study, with what its trainings achieve on another data set. Results are kept in a
        folder of that name in each run's folder, and in the study's.

        Raises:
            UserError: a run is not finished.
        """
        unfinished = [f"{r.name}, seed {r.seed}" for r in self.runs if r.results() is None]
        if unfinished:
            raise UserError(
                f"{self.output}: to be evaluated on {test_set} all runs have to be finished, and "
                f"{listed(unfinished)} {'is' if len(unfinished) == 1 else 'are'} not: run the "
                "study without --evaluate-on first"
            )
        runs = [
            dataclasses.replace(r, folder=os.path.join(r.folder, test_set), test_set=test_set)
            for r in self.runs
        ]
        return dataclasses.replace(self, output=os.path.join(self.output, test_set), runs=runs)


def load_study(path: str) -> Study:
    """
    Raises:
        UserError: no such file, not valid YAML, a key that is unknown, missing or of the wrong
            kind; or a config with an error of its own.
    """
    try:
        with open(path) as f:
            content = yaml.safe_load(f)
    except OSError as e:
        raise UserError(f"{path}: cannot read this study: {e.strerror}") from e
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    _check_keys(path, content, {"output", "seeds", "runs"}, {"overrides", "metrics", "baseline"})

    seeds = content["seeds"]
    if not (isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)):
        raise UserError(f"{path}: seeds = {seeds!r}: must be a list of whole numbers >= 0")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{path}: seeds = {seeds!r}: each may come once")
    if not (isinstance(content["runs"], dict) and content["runs"]):
        raise UserError(f"{path}: runs must map names to config files")

    runs, baselines = [], {}
    for name, entry in content["runs"].items():
        entry = {"config": entry} if isinstance(entry, str) else entry
        _check_keys(f"{path}: run {name}", entry, {"config"}, {"overrides", "baseline"})
        config = str(entry["config"])
        overrides = tuple(
            str(word)
            for where in (content, entry)
            for word in _list(path, "overrides", where.get("overrides"))
        )
        cfg = load_config(config, list(overrides))
        for seed in seeds:
            folder = os.path.join(str(content["output"]), str(name), f"seed_{seed}")
            cfg.SEED, cfg.OUTPUT_DIR = seed, folder
            runs.append(
                Run(
                    name=str(name),
                    config=config,
                    seed=seed,
                    overrides=overrides,
                    folder=folder,
                    max_iter=cfg.SOLVER.MAX_ITER,
                    settings=cfg.dump(),
                )
            )
        baseline = entry.get("baseline", content.get("baseline"))
        if baseline is not None and str(baseline) != str(name):
            baselines[str(name)] = str(baseline)
    names = list(dict.fromkeys(run.name for run in runs))
    for name, baseline in baselines.items():
        if baseline not in names:
            raise UserError(
                f"{path}: baseline {baseline} of {name} is none of the runs ({listed(names)})"
            )
    metrics = _list(path, "metrics", content.get("metrics")) or list(METRICS)
    return Study(str(content["output"]), [str(m) for m in metrics], runs, baselines)


def _list(path: str, key: str, value) -> List:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{path}: {key} = {value!r}: must be a list, such as [{value}]")
    return value


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
