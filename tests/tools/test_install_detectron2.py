"""Laws of tools/install_detectron2.py. Nothing here uses the network or changes an environment."""

import base64
import csv
import hashlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement  # pytest requires it

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "install_detectron2.py"


@pytest.fixture
def tool(load_script):
    """The script as a fresh module, so that a test may replace its functions."""
    return load_script("tools/install_detectron2.py")


def fake_source(tool):
    """The least that the script takes for v0.6's source: every text that the patch replaces, and
    one file of each part of the wheel."""
    files = {
        "LICENSE": b"the licence\n",
        "setup.py": b"raise RuntimeError('not for the wheel')\n",
        "tools/train_net.py": b"not for the wheel\n",
        "detectron2/__init__.py": b'__version__ = "0.6"\n',
        "detectron2/model_zoo/configs/Base-RCNN-FPN.yaml": b"MODEL: {}\n",
        "projects/PointRend/point_rend/__init__.py": b"point_rend = 1\n",
        "projects/DeepLab/deeplab/__init__.py": b"deeplab = 1\n",
        "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": b"panoptic = 1\n",
    }
    for path, old, _ in tool.hunks(tool.PATCH.read_text()):
        if old:
            files[path] = files.get(path, b"") + old.encode()
    return files


def patched(tool, files):
    return tool.apply_patch(files, tool.PATCH.read_text())


def write_sdist(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def sdist(tool, tmp_path, monkeypatch):
    """A small source archive whose hash is the pinned one."""
    path = write_sdist(tmp_path / "sdist.tar.gz", fake_source(tool))
    monkeypatch.setattr(tool, "SDIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def bare(tool, tmp_path, monkeypatch):
    """Make the script see an environment with torch and pip, without Detectron2, and record what
    it runs there instead of running it. Append to `bare.failing` what shall fail."""

    bare = SimpleNamespace(commands=[], environments=[], failing=[])

    def run(arguments, cwd, **environment):
        command = " ".join(map(str, arguments))
        bare.commands.append(command)
        bare.environments.append(environment)
        failed = any(text in command for text in bare.failing)
        error = "ERROR: first\nERROR: the reason\nits detail\na hint" if failed else ""
        return subprocess.CompletedProcess(arguments, int(failed), "", error)

    (tmp_path / "site").mkdir()
    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    monkeypatch.setattr(tool.sysconfig, "get_paths", lambda: {"purelib": tmp_path / "site"})
    return bare


def assert_one_line_error(capsys, *parts):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


# ---- the patch -------------------------------------------------------------------------------

PATCH = """\
# why
--- a/a.py
+++ b/a.py
@@ -1,2 +1,1 @@
 x = 1
-f(np.int)
-
@@ -8,2 +7,3 @@
 # y
+
-g(np.int), np.int64
+g(int), np.int64

# a new file
--- /dev/null
+++ b/b.py
@@ -0,0 +1,1 @@
+z
"""


def test_patch_changes_its_places_and_marks_the_file(tool):
    source = {"a.py": b"x = 1\nf(np.int)\n\n# y\ng(np.int), np.int64\n", "c.py": b"f(np.int)\n"}
    before = dict(source)
    fixed = tool.apply_patch(source, PATCH)
    assert fixed["a.py"].decode() == tool.CHANGED_NOTICE + "x = 1\n# y\n\ng(int), np.int64\n"
    assert fixed["b.py"] == b"z\n"
    assert fixed["c.py"] == source["c.py"]
    assert source == before, "the input must stay as it was"


@pytest.mark.parametrize("text", [b"", b"x = 1\n", b"x = 1\nf(np.int)\n\n" * 2])
def test_patch_that_does_not_fit_names_patch_and_file(tool, text):
    with pytest.raises(tool.InstallError, match=rf"{tool.PATCH.name}.*a\.py"):
        tool.apply_patch({"a.py": text}, PATCH)


def test_every_part_of_the_patch_fails_loudly_without_its_file(tool):
    source = fake_source(tool)
    for changed, old, _ in tool.hunks(tool.PATCH.read_text()):
        files = {path: data for path, data in source.items() if path != changed}
        if old:
            with pytest.raises(tool.InstallError, match=re.escape(changed)):
                patched(tool, files)


def test_patch_says_why_it_changes_a_file(tool):
    paragraphs = tool.PATCH.read_text().split("\n\n")[1:]
    parts = [text for text in paragraphs if "\n+++ b/" in text]
    assert len(parts) == len({path for path, _, _ in tool.hunks(tool.PATCH.read_text())})
    assert all(text.startswith("# ") for text in parts)


def test_tools_that_apply_patches_take_it_as_well(tool, tmp_path):
    if shutil.which("patch") is None:
        pytest.skip("no patch")
    source = fake_source(tool)
    for path, data in source.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    subprocess.run(["patch", "-p1", "-i", tool.PATCH], cwd=tmp_path, check=True)
    notice = tool.CHANGED_NOTICE.encode()
    for path, data in patched(tool, source).items():
        assert (tmp_path / path).read_bytes() == data.replace(notice, b"", 1)


# ---- the wheel -------------------------------------------------------------------------------


@pytest.fixture
def wheel(tool, sdist, tmp_path):
    return zipfile.ZipFile(tool.write_wheel(patched(tool, tool.read_sdist(sdist)), tmp_path))


def test_wheel_has_the_packages_and_nothing_else(tool, wheel):
    names = set(wheel.namelist())
    assert {
        "detectron2/__init__.py",
        "detectron2/_C.py",
        "detectron2/model_zoo/configs/Base-RCNN-FPN.yaml",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2/projects/deeplab/__init__.py",
        "detectron2/projects/panoptic_deeplab/__init__.py",
    } <= names
    info = f"detectron2-{tool.WHEEL_VERSION}.dist-info/"
    assert all(name.startswith(("detectron2/", info)) for name in names)
    assert wheel.read(info + "LICENSE") == b"the licence\n"


def test_wheel_starts_with_the_file_that_marks_leftovers(wheel):
    assert wheel.namelist()[0] == "detectron2/_C.py"


def test_wheel_metadata(tool, wheel):
    text = wheel.read(f"detectron2-{tool.WHEEL_VERSION}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "detectron2"
    assert metadata["Version"] == tool.WHEEL_VERSION
    assert re.fullmatch(r"0\.6\+[a-z0-9]+(\.[a-z0-9]+)*", tool.WHEEL_VERSION), "PEP 440, normal"
    assert metadata["Requires-Python"] == ">=3.10"
    requires = metadata.get_all("Requires-Dist")
    assert tuple(requires) == tool.REQUIRES
    assert "black" in requires and not any("dataclasses" in r for r in requires)


def test_wheel_record_is_complete_and_true(tool, wheel):
    record_name = f"detectron2-{tool.WHEEL_VERSION}.dist-info/RECORD"
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(wheel.read(record_name).decode()))}
    assert set(rows) == set(wheel.namelist())
    assert rows.pop(record_name) == ["", ""]
    for name, (digest, size) in rows.items():
        data = wheel.read(name)
        expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(data))


# ---- the stand-in for the compiled extension -------------------------------------------------


@pytest.fixture
def stub(tool, load_script, tmp_path):
    path = tmp_path / "_C.py"
    path.write_bytes(patched(tool, fake_source(tool))["detectron2/_C.py"])
    return load_script(path)


@pytest.mark.parametrize("op", ["InstanceAnnotation", "deform_conv_forward", "box_iou_rotated"])
def test_stub_names_the_missing_operation_and_the_cure(stub, tool, op):
    assert not hasattr(stub, op)
    with pytest.raises(stub.MissingOpError, match=op) as error:
        getattr(stub, op)
    assert tool.FULL_BUILD in str(error.value) and "\n" not in str(error.value)


def test_stub_is_an_ordinary_module_otherwise(stub):
    assert stub.__name__ == "_C" and stub.__file__ and stub.__doc__
    assert not hasattr(stub, "__path__")
    with pytest.raises(AttributeError) as error:
        stub.__wrapped__  # noqa: B018
    assert type(error.value) is AttributeError


def test_stub_answers_what_detectron2_asks_to_describe_the_environment(stub):
    assert "pure Python" in stub.get_compiler_version()
    assert "pure Python" in stub.get_cuda_version()
    assert stub.has_cuda() is False


# ---- the installation ------------------------------------------------------------------------


def test_installs_the_wheel_and_checks_it(tool, bare, sdist, capsys):
    assert tool.main(["--sdist", str(sdist)]) == 0
    output = capsys.readouterr()
    assert [f"[{i}/5]" for i in range(1, 6)] == re.findall(r"^\[\d/5\]", output.out, re.M)
    assert not output.err
    installs = [command for command in bare.commands if "pip install" in command]
    assert len(installs) == 1 and installs[0].endswith(".whl")
    assert bare.commands[-1].endswith(tool.SELF_CHECK)
    assert not any("pip download" in command for command in bare.commands)


def test_wrong_hash_is_one_line_and_installs_nothing(tool, bare, tmp_path, capsys):
    other = write_sdist(tmp_path / "other.tar.gz", fake_source(tool))
    assert tool.main(["--sdist", str(other)]) == 1
    assert_one_line_error(capsys, str(other), "SHA-256", tool.SDIST_SHA256)
    assert not any("pip install" in command for command in bare.commands)


def test_missing_sdist_is_one_line(tool, bare, tmp_path, capsys):
    assert tool.main(["--sdist", str(tmp_path / "none.tar.gz")]) == 1
    assert_one_line_error(capsys, "none.tar.gz", "no such file")


def test_failed_download_is_one_line_with_the_reason_and_the_cure(tool, bare, capsys):
    bare.failing.append("pip download")
    assert tool.main([]) == 1
    assert_one_line_error(capsys, tool.SDIST_REQUIREMENT, "the reason", "network", "--sdist")
    assert not any("pip install" in command for command in bare.commands)


def test_download_is_pinned_by_hash(tool, bare, tmp_path):
    (tmp_path / "pb1-detectron2-0.6.tar.gz").write_bytes(b"")
    tool.download_sdist(tmp_path)
    assert "--require-hashes" in bare.commands[-1]
    requirements = (tmp_path / "requirements.txt").read_text()
    assert requirements == f"{tool.SDIST_REQUIREMENT} --hash=sha256:{tool.SDIST_SHA256}\n"


@pytest.mark.parametrize("mine", ["", "/my/modules"])
def test_download_puts_its_backend_before_the_users_modules(
    tool, bare, tmp_path, mine, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", mine)
    (tmp_path / "pb1-detectron2-0.6.tar.gz").write_bytes(b"")
    tool.download_sdist(tmp_path)
    backend, *others = bare.environments[-1]["PYTHONPATH"].split(os.pathsep)
    assert (Path(backend) / "setuptools" / "build_meta.py").is_file()
    assert others == [mine] * bool(mine)  # an empty entry would be the current folder


@pytest.mark.parametrize("right_hash", [True, False])
def test_pip_downloads_the_archive_without_running_it(tool, tmp_path, right_hash, monkeypatch):
    """The installed pip, whatever its version, on an archive whose setup.py leaves a mark."""
    pytest.importorskip("pip")
    mark, index, work = tmp_path / "mark", tmp_path / "index", tmp_path / "work"
    index.mkdir()
    work.mkdir()
    files = {"setup.py": f"open({str(mark)!r}, 'w')\nraise RuntimeError('was run')\n".encode()}
    path = write_sdist(index / "pb1-detectron2-0.6.tar.gz", files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if right_hash else "0" * 64
    monkeypatch.setattr(tool, "SDIST_SHA256", digest)
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}
    for name, value in settings.items():  # no network, and no settings of the user
        monkeypatch.setenv(f"PIP_{name}", value)
    if right_hash:
        assert tool.download_sdist(work).read_bytes() == path.read_bytes()
        assert tool.read_sdist(path) == files
    else:
        with pytest.raises(tool.InstallError, match=r"(?i)do not match the hashes.*pb1-detectron2"):
            tool.download_sdist(work)
    assert not mark.exists()


def test_backend_is_that_of_the_pinned_archive(tool, tmp_path):
    backend = {}
    exec(tool.BACKEND, backend)
    info = backend["__legacy__"].prepare_metadata_for_build_wheel(str(tmp_path))
    metadata = Parser().parsestr((tmp_path / info / "METADATA").read_text())
    assert f"{metadata['Name']}=={metadata['Version']}" == tool.SDIST_REQUIREMENT
    assert info == f"{tool.SDIST_REQUIREMENT}.dist-info".replace("-", "_", 1).replace("==", "-")
    assert metadata.get_all("Requires-Dist") is None


NOT_FOUND = """\
ERROR: Could not find a version that satisfies the requirement a==1 (from versions: none)
ERROR: No matching distribution found for a==1
"""


@pytest.mark.parametrize(
    "output, expected",
    [
        ("", "exit status 7"),
        ("torch\nSegmentation fault\n", "Segmentation fault"),
        ("Traceback:\n  x()\nImportError: no libcuda\n", "ImportError: no libcuda"),
        ("KeyError: 1\nDuring handling:\nAssertionError\n", "AssertionError"),
        (NOT_FOUND, "ERROR: No matching distribution found for a==1"),
        (f"WARNING: Retrying after connection broken by 'X'\n{NOT_FOUND}", "broken by 'X'"),
        (f"Could not fetch URL https://a: bad certificate\n{NOT_FOUND}", "bad certificate"),
        (
            "ERROR: a PyPI package cannot declare a URL.\na depends on b @ https://b\n",
            "cannot declare a URL. a depends on b @ https://b",
        ),
        (
            "  ImportError: no such thing\n  [end of output]\nnote: from a subprocess\n"
            "error: metadata-generation-failed\n\n× Encountered error.\nhint: See above.\n",
            "ImportError: no such thing",
        ),
        (
            "ERROR: Cannot install a and b.\n\nThe conflict is caused by:\n  a depends on c\n"
            "ERROR: ResolutionImpossible: for help visit https://pip\n",
            "Cannot install a and b. The conflict is caused by:",
        ),
    ],
)
def test_reason_is_the_cause(tool, output, expected):
    text = tool.reason(subprocess.CompletedProcess([], 7, "", output))
    assert text.endswith(expected) and "\n" not in text


@pytest.mark.parametrize("name", ["pip", "torch", "torchvision"])
def test_missing_module_is_one_line_with_the_cure(tool, bare, name, capsys):
    bare.failing.append(name)
    assert tool.main([]) == 1
    cure = "ensurepip" if name == "pip" else f"pip install {name}"
    assert_one_line_error(capsys, f"cannot import {name} (", "the reason", cure)


def test_failed_install_is_one_line(tool, bare, sdist, capsys):
    bare.failing.append("pip install")
    assert tool.main(["--sdist", str(sdist)]) == 1
    assert_one_line_error(capsys, "pip cannot install", "the reason")


def test_failed_self_check_uninstalls_again(tool, bare, sdist, capsys):
    bare.failing.append("model_zoo")
    assert tool.main(["--sdist", str(sdist)]) == 1
    assert_one_line_error(capsys, "does not run", "the reason", "uninstalled again")
    assert bare.commands[-1] == "-m pip uninstall -y detectron2"


def test_python_too_old_is_one_line(tool, bare, monkeypatch, capsys):
    monkeypatch.setattr(tool, "MIN_PYTHON", (99, 0))
    assert tool.main([]) == 1
    assert_one_line_error(capsys, "Python >= 99.0", sys.executable)
    assert not bare.commands


@pytest.mark.parametrize("force", [False, True])
def test_installed_but_broken_is_reported_unless_forced(
    tool, bare, sdist, force, monkeypatch, capsys
):
    spec = SimpleNamespace(origin="/somewhere/detectron2/__init__.py")
    monkeypatch.setattr(tool, "find_spec", lambda name: spec)
    bare.failing.append("import detectron2.layers")
    status = tool.main(["--sdist", str(sdist)] + ["--force"] * force)
    installs = [command for command in bare.commands if "pip install" in command]
    if force:
        assert status == 0 and any("--force-reinstall --no-deps" in c for c in installs)
    else:
        assert status == 1 and not installs
        assert_one_line_error(capsys, "/somewhere/detectron2", "the reason", "--force")


# ---- leftovers of an interrupted installation ------------------------------------------------


@pytest.mark.parametrize(
    "text, record, removed",
    [("ours", False, True), ("ours", True, False), ("someone else's", False, False)],
)
def test_leftovers_are_removed_only_if_they_are_ours(tool, bare, tmp_path, text, record, removed):
    package = tmp_path / "site" / "detectron2"
    info = tmp_path / "site" / f"detectron2-{tool.WHEEL_VERSION}.dist-info"
    package.mkdir()
    info.mkdir()
    stub = patched(tool, fake_source(tool))["detectron2/_C.py"]
    (package / "_C.py").write_bytes(stub if text == "ours" else b"# a module\n")
    if record:
        (info / "RECORD").write_text("")
    assert tool.remove_leftovers() is removed
    assert package.exists() is not removed and info.exists() is not removed


# ---- what is there is left alone -------------------------------------------------------------


@pytest.mark.parametrize(
    "code, error",
    [
        ("import a_module_that_is_missing", "No module named 'a_module_that_is_missing'"),
        ("import os; os._exit(7)", "exit status 7"),
    ],
)
def test_broken_detectron2_is_one_line(tmp_path, code, error):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text(code)
    process = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1
    assert f"installed in {tmp_path / 'detectron2'}" in process.stderr
    assert error in process.stderr and "--force" in process.stderr


def test_existing_detectron2_is_left_alone(tmp_path):
    detectron2 = pytest.importorskip("detectron2")
    arguments = [sys.executable, str(SCRIPT), "--sdist", str(SCRIPT)]  # the wrong file, not read
    process = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert f"already in {Path(detectron2.__file__).parent}" in process.stdout
    assert "[2/5]" not in process.stdout


# ---- sahi, which `make install` installs without its requirements ------------------------------


@pytest.fixture
def setup_py(monkeypatch):
    """The variables of setup.py."""
    fake = SimpleNamespace(setup=lambda **_: None, find_packages=lambda **_: [])
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def default_names(setup_py):
    """The packages that `pip install -e '.[dev]'` asks for."""
    requirements = setup_py.INSTALL_REQUIRES + setup_py.EXTRAS_REQUIRE["dev"]
    return {Requirement(text).name.lower() for text in requirements}


def test_sahi_is_installed_without_opencv_python(setup_py, default_names):
    """The two packages of OpenCV overwrite each other's files."""
    assert not {"sahi", "opencv-python"} & default_names
    assert f"SAHI := {setup_py.SAHI}\n" in (ROOT / "Makefile").read_text()
    assert " --no-deps '$(SAHI)'\n" in (ROOT / "Makefile").read_text()
    for page in ("README.md", "docs/large_images.md"):
        assert f" --no-deps '{setup_py.SAHI}'\n" in (ROOT / page).read_text()


def test_sahi_has_all_else_that_it_requires(setup_py, default_names):
    try:
        texts = metadata.requires("sahi")
    except metadata.PackageNotFoundError:
        pytest.fail(f"no sahi, all its tests are skipped: pip install --no-deps '{setup_py.SAHI}'")
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = requirement.name.lower().replace("opencv-python", "opencv-python-headless")
            assert name in default_names
            assert requirement.specifier.contains(metadata.version(name), prereleases=True)
