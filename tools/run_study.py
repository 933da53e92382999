#!/usr/bin/env python
"""
Train several configs with several seeds and put them into one table.

    python tools/run_study.py tools/studies/detectors.yaml
    python tools/run_study.py tools/studies/detectors.yaml --jobs 2
    python tools/run_study.py tools/studies/detectors.yaml --table-only
    python tools/run_study.py tools/studies/detectors.yaml --evaluate-on small_shapes_test
    python tools/run_study.py tools/studies/hit_uav.yaml --open-test

A study is a YAML file, see cbbl_d2/analysis/study.py. Each run is a process of train_net.py with
an output folder of its own. Called again, this skips what is finished and resumes what is not. In
the folder of the study it writes table.md, table.csv and plot.png, and budget.png for runs that are
named by their length, such as cbbl_600 and cbbl_1200.

Each finished run is recorded in small text files, in the folder "results" of the study, such as
docs/results/hit_uav. Committed, they are all that another machine needs to go on with the study,
see cbbl_d2/analysis/study_record.py.

--evaluate-on evaluates the last checkpoint of every finished run on another data set, such as a
test split once all choices are made, and writes the same table for it into a folder of its name.
"""

import argparse
import contextlib
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Dict, List, Tuple

import tqdm
from cbbl_d2.analysis import study_table
from cbbl_d2.analysis.gradient_table import gradients_of
from cbbl_d2.analysis.study import Run, Study, load_study
from cbbl_d2.analysis.study_record import changed_settings, commit
from cbbl_d2.engine.cli import number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import open_whole
from cbbl_d2.messages import listed

TRAIN_NET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "train_net.py")


def command(run: Run) -> List[str]:
    what = "--eval-only" if run.evaluation else "--resume"
    weights = ["MODEL.WEIGHTS", run.weights] if run.evaluation else []
    where = ["SEED", str(run.seed), "OUTPUT_DIR", run.folder]
    program = [sys.executable, TRAIN_NET, "--config-file", run.config, what]
    return [*program, *run.overrides, *weights, *where]


def check_unchanged(run: Run) -> None:
    """A folder belongs to one config: results of another would be taken for this one's."""
    path = os.path.join(run.folder, "study_config.yaml")
    if not os.path.exists(path):
        with open_whole(path) as f:
            f.write(run.settings)
        return
    with open(path) as f:
        changed = changed_settings(f.read(), run.settings)
    if changed:
        raise UserError(
            f"{run.folder}: was trained with other settings, which now are {listed(changed)}: "
            "delete the folder, or give the study another output"
        )


def num_threads(jobs: int) -> int:
    """Of each process, unless OMP_NUM_THREADS says: else each would start one for every core."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))


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
        with open(os.path.join(run.folder, "console.txt"), "ab") as console:
            return subprocess.Popen(
                command(run),
                stdout=console,
                stderr=console,
                pass_fds=(lock.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": str(num_threads(jobs))},
            )


def last_line(run: Run) -> str:
    with open(os.path.join(run.folder, "console.txt"), errors="replace") as f:
        lines = f.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def is_done(study: Study, run: Run) -> bool:
    """Whether all that is to be known of a run is on record."""
    found = study.records.find(run)
    if found is None:
        return False
    unread = study.test_set and not study.records.find_sealed(run, study.test_set)
    # What the study has got later is made up for where the weights are.
    return not (unread or found.missing) or not os.path.isfile(run.weights)


def sealed_evaluations(study: Study, run: Run) -> List[Run]:
    """The evaluations of a run that stay unread, in their order."""
    sealed = study.test_set and run.sealed(study.test_set)
    return [sealed, *sealed.evaluations] if sealed else []


def record(study: Study, run: Run, jobs: int) -> None:
    sealed = sealed_evaluations(study, run)
    if sealed:
        study.records.seal(run, study.test_set, sealed[0].all_results(), sealed[0].folder)
    found = study.records.find(run)
    if found is None or found.missing:
        results = {**run.all_results(), **gradients_of(run)}
        study.records.add(run, results, run.folder, num_threads(jobs))
    for part in sealed:  # last: what was sealed stands in readable logs, too
        shutil.rmtree(part.folder, ignore_errors=True)


def train(study: Study, jobs: int) -> List[Run]:
    """
    Train and evaluate what is not finished, ``jobs`` runs at a time. Returns the runs that failed.
    """
    waiting = [run for run in study.runs if not is_done(study, run)]
    running: Dict[Run, Tuple[Run, subprocess.Popen]] = {}  # with the stage that it is in
    failed = []
    total = sum(run.max_iter for run in study.runs)
    with tqdm.tqdm(total=total, unit="it", desc=f"{len(study.runs)} runs", smoothing=0) as bar:
        bar.update(sum(r.max_iter for r in study.runs if r not in waiting))
        bar.initial = bar.n  # so that the ETA counts only what this call does

        def proceed(run: Run) -> None:
            """Start what is to be done next, or record the run."""
            stages = [run, *run.evaluations, *sealed_evaluations(study, run)]
            stage = next((s for s in stages if s.results() is None), None)
            if stage is not None:
                running[run] = stage, start(stage, jobs)
                return
            record(study, run, jobs)
            ap = study.results(run).get(study.metrics[0], float("nan"))
            bar.write(f"{run}: {study.metrics[0]} {ap:.1f}")

        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    proceed(waiting.pop(0))
                time.sleep(1)
                for run, (stage, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode != 0 or stage.results() is None:
                        failed.append(run)
                        # A sealed evaluation, or one that ended well, may end with its AP.
                        quoted = process.returncode and stage not in sealed_evaluations(study, run)
                        why = last_line(stage) if quoted else f"see {stage.folder}/console.txt"
                        bar.write(f"{run}: FAILED: {why}")
                    else:
                        proceed(run)
                unfinished = {*waiting, *running, *failed}
                done = sum(
                    min(run.last_iteration(), run.max_iter) if run in unfinished else run.max_iter
                    for run in study.runs
                )
                if done > bar.n:  # or a log file would get a line each second
                    bar.update(done - bar.n)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
    return failed


def write_table(study: Study) -> None:
    rows = study_table.summarize(study)
    if not rows:
        print(f"{study.output}: no run is finished yet")
        return

    path = functools.partial(os.path.join, study.output)
    table, more = study_table.as_markdown(study, rows), ""
    with open_whole(path("table.md")) as f:
        f.write(table)
    with open_whole(path("table.csv")) as f:
        f.write(study_table.as_csv(study, rows))
    with open_whole(path("plot.png"), "wb") as f:
        study_table.plot(study, rows, f)
    if study_table.budgets(study):
        with open_whole(path("budget.png"), "wb") as f:
            study_table.plot_budgets(study, f)
        more = ", budget.png"
    print(table)
    print(f"Written to {study.output}: table.md, table.csv, plot.png{more}")


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="YAML file")
    parser.add_argument(
        "--jobs", type=number(int, 1), default=1, help="runs at a time (default: 1)"
    )
    parser.add_argument("--table-only", action="store_true", help="train and evaluate nothing")
    parser.add_argument(
        "--evaluate-on",
        default="",
        metavar="NAME",
        help="registered data set, or one of DATASETS.COCO_FORMAT",
    )
    parser.add_argument(
        "--open-test",
        action="store_true",
        help="write and show the table of the study's test_set, which is kept unread until then; "
        "trains nothing",
    )
    args = parser.parse_args()

    study = load_study(args.study)
    for run in study.runs:
        if os.path.isdir(run.folder) or not (args.table_only or study.records.find(run)):
            check_unchanged(run)
    others = study.records.other_commits(study.runs)
    if others:
        print(
            f"warning: {study.records.folder}: {listed(others)} are of another commit than "
            f"{commit()}, with the same settings: they are used",
            file=sys.stderr,
        )
    if args.open_test:
        opened = study.opened()
        write_table(opened)
        unread = [run for run in study.runs if opened.measured(run) is None]
        if unread:
            raise UserError(
                f"{study.output}: {listed(unread)} {'was' if len(unread) == 1 else 'were'} not "
                f"evaluated on {study.test_set}: call this without --open-test where the weights "
                "are"
            )
        return
    if args.evaluate_on:
        study = study.evaluated_on(args.evaluate_on)
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
