import csv
import io
import os

import numpy as np
import pytest
import yaml
from cbbl_d2.analysis import study_record
from cbbl_d2.analysis.study import load_study
from cbbl_d2.analysis.study_record import StudyRecords
from cbbl_d2.analysis.study_table import (
    as_markdown,
    budgets,
    plot_budgets,
    resampled_interval,
    summarize,
)
from cbbl_d2.errors import UserError


@pytest.fixture
def study_of(tmp_path, repository):
    """Writes a study file, for this machine or another one, and loads it."""
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")

    def load(machine="here", **changes):
        content = {
            "output": str(tmp_path / machine),
            "results": str(tmp_path / "results"),
            "seeds": [1, 2],
            "overrides": ["SOLVER.MAX_ITER", 20],
            "metrics": ["bbox/AP"],
            "baseline": "stock",
            "runs": {
                "stock": config,
                "cbbl": {"config": config, "overrides": ["TEST.AUG.FLIP", False]},
            },
            **changes,
        }
        path = tmp_path / f"{machine}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_study(str(path))

    return load


def add(study, values):
    for run, ap in zip(study.runs, values):
        study.records.add(run, {"bbox/AP": ap, "time": 0.5, "total_loss": 3.0}, run.folder, 1)


def test_another_machine_needs_the_records_alone(study_of):
    add(study_of(), (50.0, 51.0, 52.0, 55.0))
    other = study_of("there")
    assert all(not os.path.exists(run.folder) and run.results() is None for run in other.runs)
    stock, cbbl = summarize(other)
    assert (stock["bbox/AP"], cbbl["bbox/AP"], cbbl["bbox/AP diff"]) == (50.5, 53.5, 3.0)
    assert cbbl["time"] == 0.5 and set(cbbl["over"].values()) == {"seeds"}
    with open(os.path.join(other.records.folder, "runs.csv")) as f:
        rows = list(csv.DictReader(f))
    assert [r["run"] for r in rows] == ["stock", "stock", "cbbl", "cbbl"]
    assert rows[0]["threads"] == "1" and "torch" in rows[0]["versions"] and rows[0]["commit"]
    assert "total_loss" not in rows[0] and rows[2]["overrides"].endswith("TEST.AUG.FLIP False")


def test_the_same_settings_by_another_name_are_the_same_run(study_of):
    study = study_of()
    add(study, (50.0,))
    renamed = study_of("there", runs={"plain": study.runs[0].config}, baseline=None)
    assert renamed.results(renamed.runs[0])["bbox/AP"] == 50 and len(summarize(renamed)) == 1


def test_other_settings_under_the_same_name_are_refused(study_of):
    add(study_of(), (50.0,))
    longer = study_of("there", overrides=["SOLVER.MAX_ITER", 30])
    with pytest.raises(UserError, match="stock, seed 1, was trained with other .*MAX_ITER 30"):
        summarize(longer)


def test_a_younger_key_acted_as_its_default(study_of):
    study = study_of()
    add(study, (50.0,))
    (name,) = os.listdir(os.path.join(study.records.folder, "settings"))
    path = os.path.join(study.records.folder, "settings", name)
    content = yaml.safe_load(open(path))
    del content["MODEL"]["CBBL"]["VOTING_SIGMA"]
    with open(path, "w") as f:
        yaml.safe_dump(content, f)
    assert study_of("there").records.find(study.runs[0]) is not None
    content["MODEL"]["CBBL"]["ALPHA"] = 7.0
    with open(path, "w") as f:
        yaml.safe_dump(content, f)
    with pytest.raises(UserError, match="MODEL.CBBL.ALPHA 5.0"):
        study_of("there").records.find(study.runs[0])


def test_what_is_made_up_for_takes_the_place_of_what_was_there(study_of, monkeypatch):
    """An evaluation, after the config has got a new key, on another machine."""
    study = sealed_study(study_of)
    (run, *_) = study.runs
    monkeypatch.setattr(study_record, "commit", lambda: "one")
    monkeypatch.setattr(study_record, "device_title", lambda device: "a GPU")
    study.records.add(run, {"bbox/AP": 50.0, "time": 0.5}, run.folder, 1)
    study.records.seal(run, study.test_set, {"bbox/AP": 40.0}, run.folder)
    folder = os.path.join(study.records.folder, "settings")
    (name,) = os.listdir(folder)
    path = os.path.join(folder, name)
    content = yaml.safe_load(open(path))
    del content["MODEL"]["CBBL"]["VOTING_SIGMA"]
    with open(path, "w") as f:
        yaml.safe_dump(content, f)

    monkeypatch.setattr(study_record, "commit", lambda: "two")
    monkeypatch.setattr(study_record, "device_title", lambda device: "cpu")
    other = sealed_study(study_of, "there")
    (run, *_) = other.runs
    results = {"bbox/AP": 50.0, "twice/bbox/AP": 52.0, "time": 9.0}
    other.records.seal(run, other.test_set, {"bbox/AP": 41.0}, run.folder)
    other.records.add(run, results, run.folder, 2)
    with open(os.path.join(other.records.folder, "runs.csv")) as f:
        (row,) = csv.DictReader(f)
    assert (row["commit"], row["device"], row["threads"]) == ("one", "a GPU", "1")
    assert (row["s/iteration"], row["twice/bbox/AP"]) == ("0.500", "52.000")
    assert os.listdir(folder) == [name] == [f"{row['settings']}.yaml"]
    with open(os.path.join(other.records.folder, "test.csv")) as f:
        (sealed,) = csv.DictReader(f)
    assert sealed["settings"] == row["settings"]
    assert other.records.open_test(run, other.test_set).metrics["bbox/AP"] == 41


def test_other_annotations_are_refused(study_of, monkeypatch):
    monkeypatch.setattr(study_record, "annotations_hash", lambda cfg: "aaaa")
    add(study_of(), (50.0,))
    monkeypatch.setattr(study_record, "annotations_hash", lambda cfg: "bbbb")
    study = study_of("there")
    with pytest.raises(UserError, match="other annotation files .*small_shapes_mini_train"):
        study.records.find(study.runs[0])
    monkeypatch.setattr(study_record, "annotations_hash", lambda cfg: "")  # no data here
    assert study.records.find(study.runs[0]) is not None


def test_other_commits_are_named(study_of, monkeypatch):
    study = study_of()
    monkeypatch.setattr(study_record, "commit", lambda: "one")
    add(study, (50.0, 51.0))
    assert study.records.other_commits(study.runs) == []
    monkeypatch.setattr(study_record, "commit", lambda: "two")
    assert study_of("there").records.other_commits(study.runs) == ["stock"]


@pytest.mark.parametrize("name", ["runs.csv", "bootstrap.csv"])
def test_a_damaged_file_is_named(study_of, name):
    study = study_of()
    add(study, (50.0,))
    with open(os.path.join(study.records.folder, name), "a") as f:
        f.write("half a li\n")
    with pytest.raises(UserError, match=f"{name}: line .* is damaged"):
        study_of("there")


def test_two_studies_write_into_one_folder(study_of):
    """The one that has read before the other wrote takes nothing away."""
    first, second = study_of(), study_of("there")
    add(first, (50.0,))
    run = second.runs[1]
    second.records.add(run, {"bbox/AP": 51.0}, run.folder, 1)
    assert len(StudyRecords(first.records.folder)._rows) == 2


def sealed_study(study_of, machine="here"):
    return study_of(machine, test_set="small_shapes_mini_test")


def test_the_test_set_stays_unread_until_it_is_opened(study_of):
    study = sealed_study(study_of)
    run = study.runs[0]
    assert not study.records.find_sealed(run, study.test_set)
    study.records.seal(run, study.test_set, {"bbox/AP": 43.21, "lr": 1.0}, run.folder)
    assert study.records.find_sealed(run, study.test_set) and not study.records.find_sealed(
        study.runs[1], study.test_set
    )
    folder = study.records.folder
    assert sorted(os.listdir(folder)) == [".lock", "settings", "test.csv"]
    assert "43.2" not in open(os.path.join(folder, "test.csv")).read()
    opened = sealed_study(study_of, "there").opened()
    assert opened.results(run)["bbox/AP"] == 43.21
    assert "43.2" in as_markdown(opened, summarize(opened))
    assert "43.21" in open(os.path.join(folder, "opened_test.csv")).read()


def test_an_opened_study_has_nothing_but_what_was_sealed(study_of):
    """No number of val in the table of the test set, and none of another test set."""
    study = sealed_study(study_of)
    add(study, (50.0, 51.0, 52.0, 53.0))
    first, second = study.runs[:2]
    study.records.seal(first, study.test_set, {"bbox/AP": 40.0}, first.folder)
    study.records.seal(second, "small_shapes_mini_val", {"bbox/AP": 30.0}, second.folder)
    opened = study.opened()
    assert opened.results(first)["bbox/AP"] == 40 and opened.results(second) is None
    (row,) = summarize(opened)
    assert row["name"] == "stock" and row["seeds"] == [1]


def test_an_evaluation_of_another_kind_does_not_count(study_of):
    one = {"evaluations": {"voting": ["MODEL.CBBL.VOTING_SIGMA", 0.05]}}
    study = study_of(**one)
    run = study.runs[0]
    study.records.add(run, {"bbox/AP": 50.0, "voting/bbox/AP": 51.0}, run.folder, 1)
    same = study_of("there", **one)
    found = same.records.find(same.runs[0])
    assert found.missing == [] and found.metrics["voting/bbox/AP"] == 51
    other = study_of("there", evaluations={"voting": ["MODEL.CBBL.VOTING_SIGMA", 5.0]})
    found = other.records.find(other.runs[0])
    assert found.missing == ["voting"] and "voting/bbox/AP" not in found.metrics
    assert found.metrics["bbox/AP"] == 50


def test_other_weights_to_start_from_are_refused(study_of, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"one")
    options = {"overrides": ["MODEL.WEIGHTS", str(weights)]}
    study = study_of(**options)
    add(study, (50.0,))
    weights.write_bytes(b"two")
    with pytest.raises(UserError, match="started from other weights than .*weights.pth"):
        study_of("there", **options).records.find(study.runs[0])
    weights.unlink()
    assert study_of("there", **options).records.find(study.runs[0]) is not None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_set": "small_shapes_tst"}, "test_set: unknown data set small_shapes_tst"),
        ({"results": 3}, "results = 3: must be a name"),
        ({"output": None}, "output is empty"),
        ({"output": "/elsewhere"}, "output = '/elsewhere': must lie in the working directory"),
        ({"results": "a/../../b"}, "results = 'a/../../b': must lie in the working directory"),
        ({"runs": {"../a": "c.yaml"}}, "run '../a': must be a name for a folder, without /"),
        ({"test_set": "../b"}, "test_set '../b': must be a name for a folder, without /"),
        ({"runs": {"..": "c.yaml"}}, r"run '\.\.': must be a name"),
    ],
)
def test_malformed_names(study_of, changes, message):
    with pytest.raises(UserError, match=message):
        study_of(**changes)


def test_opening_needs_a_test_set_that_was_evaluated(study_of):
    with pytest.raises(UserError, match="no key test_set"):
        study_of().opened()
    with pytest.raises(UserError, match="no run has been evaluated on small_shapes_mini_test"):
        sealed_study(study_of).opened()


def test_interval_over_images_and_seeds(study_of, monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.normal(50, 2, size=200)  # what the images do to both
    vectors = {}
    for name, gain in (("stock", 0.0), ("cbbl", 1.0)):
        for seed in (1, 2):
            vectors[name, str(seed)] = base + gain + rng.normal(0, 0.1, size=200)
    study = study_of()
    for run in study.runs:
        vector = {"bbox/AP": vectors[run.name, str(run.seed)]}
        monkeypatch.setattr(study_record, "_bootstrap", lambda *_, v=vector: v)
        study.records.add(run, {"bbox/AP": float(vector["bbox/AP"].mean())}, run.folder, 1)
    for study in (study, study_of("there")):  # noqa: B020
        _, cbbl = summarize(study)
        assert set(cbbl["over"].values()) == {"images and seeds"}
        # Pairing takes out what the images do to both, which is +-4.
        assert 0.7 < cbbl["bbox/AP low"] < 1 < cbbl["bbox/AP high"] < 1.3
    assert "Intervals of cbbl: bootstrap over images and seeds." in as_markdown(study, [cbbl])


def test_runs_named_by_their_length_make_a_curve(study_of, repository):
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    runs = {
        name: {"config": config, "overrides": ["SOLVER.MAX_ITER", n]}
        for name, n in (("a_10", 10), ("a_20", 20), ("b_10", 10), ("other", 20))
    }
    study = study_of(overrides=[], runs=runs, baseline=None)
    assert budgets(study) == {}
    add(study, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))
    (curve,) = budgets(study).values()  # b has one length, "other" says none
    assert {n: [r["bbox/AP"] for r in x] for n, x in curve.items()} == {10: [1, 2], 20: [3, 4]}
    picture = io.BytesIO()
    plot_budgets(study, picture)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_seeds_widen_the_interval():
    same = np.zeros(100)
    low, high = resampled_interval({1: same + 1, 2: same + 3}, {1: same, 2: same, 3: same})
    assert (low, high) == (1, 3)
    one = {1: np.linspace(0, 100, 1001)}
    assert resampled_interval(one, {1: np.zeros(1001)}) == pytest.approx((2.5, 97.5))


@pytest.mark.parametrize(
    "evaluations, message",
    [
        ([1], "must map names"),
        ({"sealed": []}, "cannot be a name"),
        ({"a/b": []}, "cannot be a name"),
        ({"a": "X Y"}, "must be a list"),
        ({"a": ["MODEL.CBBL.VOTING_SIGM", 1]}, "did you mean MODEL.CBBL.VOTING_SIGMA"),
    ],
)
def test_malformed_evaluations(study_of, evaluations, message):
    with pytest.raises(UserError, match=message):
        study_of(evaluations=evaluations)
