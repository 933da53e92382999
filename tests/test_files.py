import os
import stat

import pytest
from cbbl_d2.files import atomic_folder, atomic_write


def test_atomic_write_replaces_the_content_at_the_end(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(str(path)) as f:
        f.write("new é")
        f.flush()
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_write_bytes(tmp_path):
    path = tmp_path / "file.bin"
    with atomic_write(str(path), "wb") as f:
        f.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_content_when_interrupted(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error):
        with atomic_write(str(path)) as f:
            f.write("half")
            raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_write_gives_the_usual_permissions(tmp_path):
    ordinary, new, private = (tmp_path / name for name in ("ordinary", "new", "private"))
    ordinary.write_text("")
    private.write_text("")
    private.chmod(0o600)
    for path in (new, private):
        with atomic_write(str(path)) as f:
            f.write("x")
    assert new.stat().st_mode == ordinary.stat().st_mode
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_atomic_write_follows_a_symbolic_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(str(link)) as f:
        f.write("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_atomic_write_refuses_other_modes(tmp_path):
    with pytest.raises(ValueError, match="'a'"):
        with atomic_write(str(tmp_path / "x"), "a"):
            pass


def test_atomic_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "folder"
    with atomic_folder(str(path)) as partial:
        with open(os.path.join(partial, "a"), "w") as f:
            f.write("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert os.listdir(path.parent) == ["folder"]


def test_atomic_folder_leaves_nothing_when_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_folder(str(tmp_path / "folder")) as partial:
            open(os.path.join(partial, "half"), "w").close()
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_atomic_folder_drops_what_a_killed_process_left(tmp_path):
    # What a SIGKILL leaves: the context manager never gets to its end.
    killed = atomic_folder(str(tmp_path / "folder"))
    with open(os.path.join(killed.__enter__(), "half"), "w"):
        pass
    with atomic_folder(str(tmp_path / "folder")) as partial:
        open(os.path.join(partial, "whole"), "w").close()
    assert os.listdir(tmp_path / "folder") == ["whole"]
    assert os.listdir(tmp_path) == ["folder"]


def test_atomic_folder_keeps_the_folder_of_a_faster_process(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(str(path)) as partial:
        open(os.path.join(partial, "mine"), "w").close()
        path.mkdir()
        (path / "theirs").touch()
    assert os.listdir(path) == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]
