import pytest


@pytest.fixture
def error(run, capsys):
    """``error(arguments)``: the one line that ``run``, the tool of a file's tests, ends with."""

    def error(*args, **kwargs):
        with pytest.raises(SystemExit) as e:
            run(*args, **kwargs)
        assert e.value.code == 1
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return error
