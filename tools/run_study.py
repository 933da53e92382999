#!/usr/bin/env python
"""
Train several configs with several seeds and put them into one table.

    python tools/run_study.py tools/studies/detectors.yaml
    python tools/run_study.py tools/studies/detectors.yaml --jobs 2
    python tools/run_study.py tools/studies/detectors.yaml --table-only
    python tools/run_study.py tools/studies/detectors.yaml --evaluate-on small_shapes_test

A study is a YAML file, see cbbl_d2/analysis/study.py. Each run is a process of train_net.py with
an output folder of its own. Called again, this skips what is finished and resumes what is not. In
the folder of the study it writes table.md, table.csv and plot.png.

--evaluate-on evaluates the last checkpoint of every finished run on another data set, such as a
test split once all choices are made, and writes the same table for it into a folder of its name.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from typing import Dict, List

import cbbl_d2  # noqa: F401  isort: skip  (first: it hides a warning that Detectron2 causes)
import tqdm
import yaml
from detectron2.config import CfgNode, get_cfg

from cbbl_d2 import add_cbbl_config
from cbbl_d2.analysis.study import Run, Study, load_study
from cbbl_d2.analysis.study_table import as_csv, as_markdown, plot, summarize
from cbbl_d2.engine import one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed

# It depends on the machine: a table may be made on another one than the trainings.
NO_SETTING = ("MODEL.DEVICE",)
TRAIN_NET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "train_net.py")


def command(run: Run) -> List[str]:
    what, options = "--resume", []
    if run.test_set:
        what = "--eval-only"
        options = ["MODEL.WEIGHTS", run.weights, "DATASETS.TEST", f"('{run.test_set}',)"]
    return [
        *(sys.executable, TRAIN_NET, "--config-file", run.config, what),
        *run.overrides,
        *options,
        *("SEED", str(run.seed), "OUTPUT_DIR", run.folder),
    ]


def check_unchanged(run: Run) -> None:
    """A folder belongs to one config: results of another would be taken for this one's."""
    path = os.path.join(run.folder, "study_config.yaml")
    if not os.path.exists(path):
        os.makedirs(run.folder, exist_ok=True)
        with atomic_write(path, "w") as f:
            f.write(run.settings)
        return
    with open(path) as f:
        before = flat_settings(f.read())
    now, defaults = flat_settings(run.settings), flat_settings(default_config().dump())
    # A key that is younger than the training acted as its default does.
    changed = [
        f"{key} {value}"
        for key, value in now.items()
        if key not in NO_SETTING and before.get(key, defaults[key]) != value
    ]
    if changed:
        raise UserError(
            f"{run.folder}: was trained with other settings, which now are {listed(changed)}: "
            "delete the folder, or give the study another output"
        )


def default_config() -> CfgNode:
    cfg = get_cfg()
    add_cbbl_config(cfg)
    return cfg


def flat_settings(text: str) -> Dict[str, object]:
    """Dotted config key -> value, from a config as YAML."""

    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(yaml.safe_load(text), ""))


def start(run: Run, jobs: int) -> subprocess.Popen:
    """
    The process holds a lock on its folder for as long as it lives, also when this program is killed
    and called again: two processes never write into one folder.
    """
    os.makedirs(run.folder, exist_ok=True)
    with open(os.path.join(run.folder, "lock"), "w") as lock:
        deadline = time.time() + 10  # a process that was killed just now takes a moment to go
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() > deadline:
                    raise UserError(
                        f"{run.folder}: another process trains it: wait for that one, or stop it"
                    ) from None
                time.sleep(0.2)
        threads = max(1, (os.cpu_count() or 1) // jobs)  # else each run starts one for every core
        with open(os.path.join(run.folder, "console.txt"), "ab") as console:
            return subprocess.Popen(
                command(run),
                stdout=console,
                stderr=console,
                pass_fds=(lock.fileno(),),
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )


def last_line(run: Run) -> str:
    with open(os.path.join(run.folder, "console.txt"), errors="replace") as f:
        lines = f.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def train(study: Study, jobs: int) -> List[Run]:
    """
    Train, or evaluate, what is not finished, ``jobs`` runs at a time. Returns the runs that failed.
    """
    waiting = [run for run in study.runs if run.results() is None]
    running: Dict[Run, subprocess.Popen] = {}
    failed = []
    total = sum(run.max_iter for run in study.runs)
    with tqdm.tqdm(total=total, unit="it", desc=f"{len(study.runs)} runs", smoothing=0) as bar:
        bar.update(sum(r.max_iter for r in study.runs if r not in waiting))
        bar.initial = bar.n  # so that the ETA counts only what this call does
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = start(run, jobs)
                time.sleep(1)
                for run, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode != 0 or run.results() is None:
                        failed.append(run)
                        bar.write(f"{run.name}, seed {run.seed}: FAILED: {last_line(run)}")
                    else:
                        ap = run.results().get(study.metrics[0], float("nan"))
                        bar.write(f"{run.name}, seed {run.seed}: {study.metrics[0]} {ap:.1f}")
                done = sum(min(run.last_iteration(), run.max_iter) for run in study.runs)
                if done > bar.n:  # or a log file would get a line each second
                    bar.update(done - bar.n)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
    return failed


def write_table(study: Study) -> None:
    rows = summarize(study)
    if not rows:
        print(f"{study.output}: no run is finished yet")
        return
    for name, text in (("table.md", as_markdown(study, rows)), ("table.csv", as_csv(study, rows))):
        with atomic_write(os.path.join(study.output, name), "w") as f:
            f.write(text)
    with atomic_write(os.path.join(study.output, "plot.png"), "wb") as f:
        plot(study, rows, f)
    print(as_markdown(study, rows))
    print(f"Written to {study.output}: table.md, table.csv, plot.png")


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--table-only", action="store_true", help="train and evaluate nothing")
    parser.add_argument(
        "--evaluate-on",
        default="",
        metavar="NAME",
        help="registered data set, or one of DATASETS.COCO_FORMAT",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be 1 or more")

    study = load_study(args.study)
    for run in study.runs:
        if not args.table_only or os.path.isdir(run.folder):
            check_unchanged(run)
    if args.evaluate_on:
        study = study.evaluated_on(args.evaluate_on)
        os.makedirs(study.output, exist_ok=True)
    # As Ctrl-C does, so that the trainings are ended with this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = [] if args.table_only else train(study, args.jobs)
    write_table(study)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(study.runs)} runs failed: "
            f"{listed([r.folder for r in failed])}; see log.txt and console.txt there"
        )


if __name__ == "__main__":
    main()
