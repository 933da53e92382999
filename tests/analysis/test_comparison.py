import io
import json
import math
import subprocess
import sys

import pytest
import yaml
from cbbl_d2.analysis.comparison import (
    as_markdown,
    differing_keys,
    plot,
    read_training,
    read_trainings,
)
from cbbl_d2.errors import UserError
from detectron2.config import LazyConfig


@pytest.fixture
def training(tmp_path):
    """``training(name, lines, config)``: a folder as train_net.py leaves it."""

    def write(name, lines, config=None, finished=True):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if finished:
            (folder / "model_final.pth").touch()
        return str(folder)

    return write


def loss(iteration, value, time=0.5):
    return {"iteration": iteration, "total_loss": value, "loss_cls": value / 2, "time": time}


def evaluation(iteration, ap, **more):
    return {"iteration": iteration, "bbox/AP": ap, "bbox/AP50": ap + 20, **more}


def config(lr, max_iter=40, **more):
    return {"SOLVER": {"BASE_LR": lr, "MAX_ITER": max_iter}, "OUTPUT_DIR": str(lr), **more}


def cells(text, start):
    """The cells of the row of a Markdown table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_last_and_best_evaluation(training):
    lines = [
        loss(19, 3.0, time=0.1),
        evaluation(19, 50.0, **{"bbox/APvs": 30.0, "bbox/APs": 40.0}),
        loss(29, 2.0, time=0.9),
        loss(39, 1.0, time=0.2),
        evaluation(40, 45.0),
    ]
    a = training("a", lines, config(0.1))
    b = training("b", [loss(19, 3.0)], config(0.2, max_iter=60), finished=False)
    text = as_markdown(read_trainings([a, b]))
    last, best = (line for line in text.splitlines() if line.startswith("| a |"))
    assert "| 40 (last) | 45.0 | 65.0 | - | - | - | 0.20 | 40 of 40 |" in last
    assert "| 20 (best) | 50.0 | 70.0 | - | 30.0 | 40.0 |" in best
    assert cells(text, "b")[1:3] == ["not yet", "-"]
    assert cells(text, "b")[-1] == "20 of 60, not finished"


def test_what_has_stopped_early_is_finished(training):
    lines = [loss(19, 2.0), evaluation(19, 50.0), {"iteration": 20, "stopped_early_after": 20.0}]
    assert read_training(training("early", lines, config(0.1))).is_finished
    assert not read_training(training("not_yet", lines[:2], config(0.1))).is_finished
    trained_on = [*lines, loss(29, 1.0)]
    assert not read_training(training("trained_on", trained_on, config(0.1))).is_finished


def test_only_the_settings_that_differ_are_listed(training):
    a = training("a", [loss(19, 1.0)], config(0.1, SEED=1, MODEL={"X": [8, 16], "ONLY": 1}))
    b = training("b", [loss(19, 1.0)], config(0.2, SEED=1, MODEL={"X": [8, 32]}))
    without = training("c", [loss(19, 1.0)])
    trainings = read_trainings([a, b, without])
    assert differing_keys(trainings) == {
        "SOLVER.BASE_LR": ["0.1", "0.2", "-"],
        "MODEL.X": ["[8, 16]", "[8, 32]", "-"],
        "MODEL.ONLY": ["1", "-", "-"],
    }
    text = as_markdown(trainings)
    assert "No config.yaml: c." in text and "| `SOLVER.BASE_LR` | 0.1 | 0.2 | - |" in text
    assert "The configs are alike." in as_markdown([trainings[0], trainings[0]])


def test_of_a_folder_trained_in_twice_the_last_training_counts(training):
    first = [loss(19, 9.0), loss(39, 8.0), evaluation(40, 90.0)]
    second = [loss(19, 3.0), evaluation(19, 10.0)]
    run = read_training(training("a", first + second))
    assert run.curve("total_loss") == ([19], [3.0])
    assert list(run.evaluations()) == [20] and run.evaluations()[20]["AP"] == 10.0
    # Resumed after iteration 30: what came after the checkpoint counts from the resumed part.
    resumed = [loss(19, 9.0), loss(39, 8.0), loss(39, 7.0), loss(59, 6.0)]
    run = read_training(training("b", resumed))
    assert run.curve("total_loss") == ([19, 39, 59], [9.0, 7.0, 6.0])
    # An evaluation of an old checkpoint takes nothing away.
    again = [loss(19, 9.0), loss(39, 8.0), evaluation(40, 30.0), evaluation(19, 20.0)]
    run = read_training(training("c", again))
    assert run.curve("total_loss") == ([19, 39], [9.0, 8.0])
    assert {i: row["AP"] for i, row in run.evaluations().items()} == {20: 20.0, 40: 30.0}


def test_an_evaluation_without_detections_is_never_the_best(training):
    lines = [loss(19, 1.0), evaluation(19, 5.0), loss(39, 1.0), evaluation(39, math.nan)]
    text = as_markdown([read_training(training("a", lines))])
    last, best = (line for line in text.splitlines() if line.startswith("| a |"))
    assert "40 (last) | - |" in last and "20 (best) | 5.0 |" in best


def test_with_several_test_sets_the_first_one_counts(training):
    line = {"iteration": 19, "total_loss": 1.0, "b/bbox/AP": 30.0, "a/bbox/AP": 20.0}
    run = read_training(training("a", [line], config(0.1, DATASETS={"TEST": ["b", "a"]})))
    assert run.evaluations()[20]["AP"] == 30.0


def test_labels_are_what_tells_the_paths_apart(training):
    folders = [training(f"{name}/seed_1", [loss(19, 1.0)]) for name in ("cbbl", "smooth_l1")]
    assert [t.label for t in read_trainings(folders)] == ["cbbl", "smooth_l1"]
    assert [t.label for t in read_trainings(folders[:1])] == ["seed_1"]
    assert [t.label for t in read_trainings(folders, ["x", "y"])] == ["x", "y"]
    with pytest.raises(UserError, match="1 labels for 2 folders"):
        read_trainings(folders, ["x"])
    with pytest.raises(UserError, match="x: stands for two trainings"):
        read_trainings(folders, ["x", "x"])
    with pytest.raises(UserError, match="stands for two trainings"):
        read_trainings([folders[0], folders[0]])


@pytest.mark.parametrize("evaluated", (True, False))
def test_plot(training, evaluated):
    lines = [loss(19, 3.0), *([evaluation(19, 50.0)] if evaluated else []), loss(39, math.nan)]
    picture = io.BytesIO()
    plot([read_training(training("a", lines)), read_training(training("b", lines))], picture)
    assert picture.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "metrics, settings, message",
    [
        (None, None, "has no metrics.json"),
        ("", None, "has no line with an iteration"),
        ("[]\n{", None, "has no line with an iteration"),
        ('{"iteration": 1}', "a: [", "config.yaml: not valid YAML"),
        ('{"iteration": 1}', "- a", "config.yaml: not a config"),
    ],
)
def test_folders_that_are_no_training(tmp_path, metrics, settings, message):
    if metrics is not None:
        (tmp_path / "metrics.json").write_text(metrics)
    if settings is not None:
        (tmp_path / "config.yaml").write_text(settings)
    with pytest.raises(UserError, match=message) as error:
        read_training(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_tool(training, repository, tmp_path):
    folder = training("a", [loss(19, 3.0), evaluation(19, 50.0)], config(0.1))
    tool = [sys.executable, f"{repository}/tools/compare.py"]
    done = subprocess.run(
        [*tool, folder, "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "comparison.md").read_text() in done.stdout
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    failed = subprocess.run([*tool, "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "error: nowhere: no such folder: give the OUTPUT_DIR of a training\n"


def test_configs_of_lazy_trainings(training, repository):
    """Detectron2 writes Python objects into them; none is made when they are read."""
    folders = []
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folder = training(name, [loss(19, 1.0), evaluation(19, 50.0)])
        lazy = LazyConfig.load(f"{repository}/configs/SmallShapes/cbbl_fcos.py")
        lazy.optimizer.lr = lr
        lazy.train.max_iter = 20
        LazyConfig.save(lazy, f"{folder}/config.yaml")
        folders.append(folder)
    trainings = read_trainings(folders)
    assert differing_keys(trainings) == {"optimizer.lr": ["0.1", "0.2"]}
    assert cells(as_markdown(trainings), "a")[-1] == "20 of 20"


def test_a_folder_that_is_trained_in_again_is_not_finished(training):
    """The checkpoint in it is still that of the training before."""
    (again,) = read_trainings([training("a", [loss(39, 1.0), loss(9, 3.0)], config(0.1))])
    assert cells(as_markdown([again]), "a")[-1] == "10 of 40, not finished"
