import argparse
import subprocess
import sys

import pytest
import torch
from cbbl_d2.engine import load_config, one_line_errors
from cbbl_d2.engine.cli import number
from cbbl_d2.errors import ConfigError, UserError


def test_overrides_and_device(repository):
    cfg = load_config(f"{repository}/configs/SmallShapes/cbbl.yaml", ["MODEL.CBBL.ALPHA", "3.5"])
    assert cfg.MODEL.CBBL.ALPHA == 3.5
    assert cfg.MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.CBBL.ALPA", "3.0"], r"MODEL\.CBBL\.ALPA; did you mean MODEL\.CBBL\.ALPHA\?"),
        (["MODEL.CBBL.NUM_INTERVALS", "many"], r"MODEL\.CBBL\.NUM_INTERVALS"),
        (["MODEL.CBBL.ALPHA"], "KEY VALUE pairs"),
        (["OUTPUT_DIR", "a", "--resume"], "put --resume before them"),
        (["MODEL.CBBL.ALPHA", "4"], r"MODEL\.CBBL\.ALPHA = 4: must be of type float, such as 5\.0"),
        (["DATASETS.TRAIN", "mine"], r"DATASETS\.TRAIN = mine: must be of type tuple"),
    ],
)
def test_bad_overrides(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config("", opts)


@pytest.mark.parametrize(
    "content, message",
    [
        ("MODEL:\n  CBBL:\n    BETTA: 1.0\n", r"mine.yaml: unknown .*BETTA; did you mean .*BETA\?"),
        ("MODEL: [", "mine.yaml: not valid YAML"),
        ("_BASE_: nothing.yaml\n", "nothing.yaml does not exist"),
        ("OUTPUT_DIR: !!python/object/apply:os.getcwd []\n", "mine.yaml: not valid YAML"),
        ("just text\n", "mine.yaml: "),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml: no such config file"):
        load_config("nowhere.yaml")


def test_one_line_errors(capsys):
    @one_line_errors
    def fails(error):
        raise error

    with pytest.raises(SystemExit) as status:
        fails(UserError("a.json: broken;\n mend it"))
    assert status.value.code == 1
    assert capsys.readouterr().err == "error: a.json: broken; mend it\n"

    # As torch's data loader passes on the error of a worker.
    worker = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent"
    with pytest.raises(SystemExit):
        fails(UserError(f"{worker} call last):\n  ...\ncbbl_d2.errors.UserError: x.png: broken\n"))
    assert capsys.readouterr().err == "error: x.png: broken\n"

    with pytest.raises(SystemExit) as status:
        fails(KeyboardInterrupt())
    assert status.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"

    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        fails(ZeroDivisionError())


def test_a_reader_that_has_enough_is_no_error():
    """As ``python tools/compare.py ... | head``."""
    program = """
from cbbl_d2.engine import one_line_errors

@one_line_errors
def main():
    for _ in range(100000):
        print("a line of a table")

main()
"""
    first = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    first.stdout.readline()
    first.stdout.close()
    assert first.stderr.read() == b""
    assert first.wait(60) == 1


def test_numbers_of_a_command_line():
    assert number(int, 1)("7") == 7 and number(float, 0, 0.9)("0.9") == 0.9
    for kind, limits, text, message in [
        (int, (1,), "0", "0: must be a whole number of at least 1"),
        (int, (1,), "1.5", "1.5: must be a whole number of at least 1"),
        (float, (0, 1), "1.1", "1.1: must be a number from 0 to 1"),
        (float, (0,), "inf", "inf: must be a number of at least 0"),
        (float, (0,), "nan", "nan: must be a number of at least 0"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            number(kind, *limits)(text)
        assert str(error.value) == message
