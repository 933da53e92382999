#!/usr/bin/env python3
"""Make `import detectron2` work in the current Python environment, from PyPI alone.

If Detectron2 is already here it is left alone. Otherwise this installs the Python part of
Detectron2 v0.6 under its own name, as a normal wheel that `pip show detectron2` and
`pip uninstall detectron2` know about:

1. pip downloads `pb1-detectron2` 0.6, a third party's upload of the v0.6 tag (PyPI has no
   `detectron2`). Its SHA-256 is pinned below, and its setup.py is never run.
2. The changes in detectron2_v0.6.patch are applied, each with its reason there, so that it runs on
   today's NumPy, Pillow and torch.
3. `detectron2._C`, the compiled extension, is a stand-in whose operations raise an error that names
   the operation. Detectors with axis-aligned boxes do not need it: NMS and ROIAlign come from
   torchvision. Deformable convolution and rotated boxes do.
"""

# Standard library only, and nothing at import that Python 3.6 does not know: a Python that is
# too old is to be told so by this file and not by a SyntaxError.
import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

MIN_PYTHON = (3, 10)
SDIST_REQUIREMENT = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
WHEEL_VERSION = "0.6+cbbl.pure"  # the local part tells it from a full build in `pip list`
FULL_BUILD = "https://detectron2.readthedocs.io/tutorials/install.html"

# v0.6's own install_requires, with what time has changed.
REQUIRES = (
    "Pillow>=7.1",
    "matplotlib",
    "numpy",  # v0.6 relies on its dependencies to bring it
    "pycocotools>=2.0.8",  # v0.6: >=2.0.2; 2.0.8 is the first one built for NumPy 2
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",  # locked by Detectron2 against breaking changes
    "iopath>=0.1.7,<0.1.10",  # the same
    "omegaconf>=2.1,<2.4",  # v0.6 has no upper bound, Detectron2's main branch has this one
    "hydra-core>=1.3",  # v0.6: >=1.1; older ones fail on Python 3.11's dataclass rules
    "black",  # v0.6 pins 21.4b2, which cannot be imported with today's click
    # Left out: dataclasses (Python 3.6 only), future and pydot (the removed caffe2 export).
)

METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {WHEEL_VERSION}
Summary: Detectron2 v0.6 without its compiled operations, fixed up for today's NumPy and torch
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Requires-Python: >={MIN_PYTHON[0]}.{MIN_PYTHON[1]}
""" + "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIRES)

WHEEL = """\
Wheel-Version: 1.0
Generator: install_detectron2.py
Root-Is-Purelib: true
Tag: py3-none-any
"""

# Small projects that v0.6's setup.py installs below detectron2.projects.
PROJECTS = "^projects/[^/]+/(point_rend|deeplab|panoptic_deeplab)/"

PATCH = Path(__file__).with_name("detectron2_v0.6.patch")
CHANGED_NOTICE = "# Changed from Detectron2 v0.6 by cbbl_d2's tools/install_detectron2.py.\n"

# How the stand-in for the compiled extension begins: a file that is ours to remove.
STUB_MARK = "Stand-in for Detectron2's compiled extension, written by install_detectron2.py."

# To download a source archive, pip reads its metadata, for which setuptools runs its setup.py. This
# one imports torch, and pip >= 26.3 refuses what it says, because an extra of it names a URL. This
# build backend (PEP 517) takes the place of setuptools in the download, and runs nothing.
BACKEND = r"""
from pathlib import Path

class __legacy__:  # setuptools.build_meta:__legacy__ is the backend of a source that names none
    @staticmethod
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        info = Path(folder, "pb1_detectron2-0.6.dist-info")
        info.mkdir()
        info.joinpath("METADATA").write_text(
            "Metadata-Version: 2.1\nName: pb1-detectron2\nVersion: 0.6\n"
        )
        return info.name
"""

SELF_CHECK = """
import importlib.util, logging, torch, detectron2.engine, detectron2.evaluation
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
if importlib.util.find_spec("cv2"):  # like Detectron2, leave the choice of an OpenCV to the user
    import detectron2.utils.visualizer
torch.manual_seed(0)
cfg = get_cfg()
cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"  # no download, no GPU needed
cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
model = build_model(cfg).eval()
with torch.no_grad():
    (output,) = model([{"image": torch.zeros(3, 64, 64)}])
assert torch.isfinite(output["instances"].pred_boxes.tensor).all()
"""


class InstallError(Exception):
    """Reaches the user as one line."""


def run(arguments, cwd, **environment):
    """Run this Python with `arguments` away from the caller's folder, whose files could shadow
    modules; return the finished process with its output as text."""
    return subprocess.run(
        [sys.executable] + [str(a) for a in arguments],
        cwd=str(cwd),
        env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


# pip closes some errors with a line that names no cause, like `error: metadata-generation-failed`.
ERROR_LINE = r"(?i)[\w.]*(error|exception)(: (?!ResolutionImpossible|\w+(-\w+)+$)|$)"


def reason(process):
    """What a failed process says of the cause: its last error, else its last line."""
    lines = [s.strip() for s in (process.stdout + "\n" + process.stderr).splitlines() if s.strip()]
    errors = [i for i, line in enumerate(lines) if re.match(ERROR_LINE, line)]
    if not errors:
        return lines[-1] if lines else f"exit status {process.returncode}"
    error = lines[errors[-1]]
    if "No matching distribution" in error:  # pip says so as well if it cannot reach the index
        broken = [s for s in lines if "connection broken by" in s or "Could not fetch URL" in s]
        return (broken or [error])[-1]
    # The second line of pip's own errors names the package.
    return " ".join(lines[errors[-1] :][: 2 if error.startswith("ERROR: ") else 1])


def check_prerequisites(work):
    """Fail before anything is changed if a module that has to be here cannot be imported."""
    for name in ("pip", "torch", "torchvision"):
        process = run(["-c", f"import {name}"], work)
        if process.returncode:
            cure = "ensurepip" if name == "pip" else f"pip install {name}"
            raise InstallError(
                f"cannot import {name} ({reason(process)}): run `{sys.executable} -m {cure}`"
            )


def is_installed(work):
    """Whether there is a Detectron2, which is then reported; one that is broken is an error."""
    spec = find_spec("detectron2")
    if spec is None or not spec.origin:  # without an origin: a folder that only has the name
        return False
    place = os.path.dirname(spec.origin)
    code = "import detectron2.layers, detectron2.modeling; print(detectron2.__version__)"
    process = run(["-c", code], work)
    if process.returncode:
        raise InstallError(
            f"Detectron2 is installed in {place} but cannot be imported ({reason(process)}): "
            "repair it, or replace it by running this with --force"
        )
    print(f"Detectron2 {process.stdout.split()[-1]} is already in {place}.")
    return True


def remove_leftovers():
    """Remove what a killed run of this script left: its package without pip's RECORD of it."""
    site = Path(sysconfig.get_paths()["purelib"])
    stub = site / "detectron2" / "_C.py"  # the wheel's first file: every leftover has it
    infos = list(site.glob("detectron2-*.dist-info"))
    if any((info / "RECORD").exists() for info in infos):
        return False
    if not stub.is_file() or STUB_MARK not in stub.read_text(encoding="utf-8"):
        return False
    for folder in [site / "detectron2", *infos]:
        shutil.rmtree(folder)
    return True


def download_sdist(work):
    """Download the source archive with pip, which checks its hash; nothing in it is run."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{SDIST_REQUIREMENT} --hash=sha256:{SDIST_SHA256}\n")
    package = work / "backend" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "build_meta.py").write_text(BACKEND)
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    options = "-m pip download --no-input --no-deps --no-binary :all: --no-build-isolation"
    arguments = options.split() + ["--require-hashes", "-r", requirements, "-d", work]
    # Older pips need to be told to use a build backend, newer ones may drop the option for it.
    process = run(arguments, work, PYTHONPATH=path, PIP_USE_PEP517="1")
    found = sorted(work.glob("pb1*.tar.gz"))
    if process.returncode or not found:
        raise InstallError(
            f"cannot download {SDIST_REQUIREMENT} ({reason(process)}): check the network, or "
            "pass a copy of its source archive with --sdist"
        )
    return found[0]


def read_sdist(path):
    """The archive's regular files as {path below its top folder: bytes}; checks the hash first."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise InstallError(
            f"{path} has SHA-256 {digest} instead of {SDIST_SHA256}: it is not the archive of "
            f"{SDIST_REQUIREMENT} that this script was made for; nothing was installed"
        )
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                name = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                files[str(name)] = archive.extractfile(member).read()
    return files


def hunks(patch):
    """The path, the old and the new text of each place that a unified diff changes."""
    for part in re.split(r"^--- .*\n\+\+\+ b/", patch, flags=re.M)[1:]:
        path, *places = re.split(r"^@@ .*\n", part, flags=re.M)
        for place in places:
            lines = place.splitlines(True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            yield path.strip(), old, new


def apply_patch(files, patch):
    """A copy of `files` with a unified diff applied; one that does not fit is an error."""
    fixed = dict(files)
    for path, old, new in hunks(patch):
        text = fixed.get(path, b"").decode("utf-8")
        if text.count(old) != 1:
            raise InstallError(
                f"{PATCH.name} does not fit {path}, so this is not the source of v0.6; nothing "
                "was installed"
            )
        fixed[path] = text.replace(old, new).encode("utf-8")
    for path in files:  # Detectron2's licence asks for a notice in changed files
        if fixed[path] != files[path]:
            fixed[path] = CHANGED_NOTICE.encode("utf-8") + fixed[path]
    return fixed


def write_wheel(files, folder):
    """Write a wheel of the source `files` into `folder`; return its path."""
    info = f"detectron2-{WHEEL_VERSION}.dist-info/"
    contents = {}  # in the order in which pip will write them
    for path, data in sorted(files.items()):  # detectron2/_C.py comes first: see remove_leftovers
        path = re.sub(PROJECTS, r"detectron2/projects/\1/", path)
        if path.startswith("detectron2/"):
            contents[path] = data
    contents[info + "METADATA"] = METADATA.encode("utf-8")
    contents[info + "WHEEL"] = WHEEL.encode("utf-8")
    contents[info + "top_level.txt"] = b"detectron2\n"
    contents[info + "LICENSE"] = files["LICENSE"]
    record = f"{info}RECORD,,\n"
    wheel = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
            record += f"{path},sha256={digest.decode('ascii')},{len(data)}\n"
        archive.writestr(info + "RECORD", record)
    return wheel


def pip_install(wheel, work, force):
    process = run(["-m", "pip", "install", "--no-input", wheel], work)
    if force and not process.returncode:  # its requirements are there: replace only the package
        options = ["--force-reinstall", "--no-deps", "--no-input"]
        process = run(["-m", "pip", "install", *options, wheel], work)
    if process.returncode:
        raise InstallError(f"pip cannot install Detectron2's wheel: {reason(process)}")


def self_check(work):
    """Build a Faster R-CNN on the CPU and run it once; take the package away if that fails."""
    process = run(["-W", "ignore", "-c", SELF_CHECK], work)
    if process.returncode:
        removal = run(["-m", "pip", "uninstall", "-y", "detectron2"], work)
        state = "could not be uninstalled" if removal.returncode else "was uninstalled again"
        raise InstallError(
            f"Detectron2 was installed but does not run ({reason(process)}); it {state}"
        )


def install(sdist, force, work):
    print("[1/5] Checking this environment: " + sys.executable, flush=True)
    if sdist is not None and not sdist.is_file():
        raise InstallError(f"--sdist {sdist}: no such file")
    if remove_leftovers():
        print("      removed the leftovers of an interrupted installation")
    if not force and is_installed(work):
        return
    check_prerequisites(work)
    print("[2/5] Getting the source archive of Detectron2 v0.6", flush=True)
    files = read_sdist(download_sdist(work) if sdist is None else sdist)
    print(f"[3/5] Building a wheel, changed by {PATCH.name}", flush=True)
    files = apply_patch(files, PATCH.read_text(encoding="utf-8"))
    wheel = write_wheel(files, work)
    print("[4/5] Installing it and what it requires", flush=True)
    pip_install(wheel, work, force)
    print("[5/5] Building and running a Faster R-CNN on the CPU", flush=True)
    self_check(work)
    print(f"Detectron2 {WHEEL_VERSION} is installed and works. It has no compiled operations:")
    print(f"deformable convolution and rotated boxes need a full build, see {FULL_BUILD}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sdist",
        type=lambda text: Path(text).resolve(),
        metavar="PATH",
        help="use this copy of the source archive instead of downloading it (its hash is checked)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the Detectron2 that is installed, if any"
    )
    args = parser.parse_args(argv)
    try:
        if sys.version_info < MIN_PYTHON:
            wanted, found = ".".join(map(str, MIN_PYTHON)), sys.version.split()[0]
            raise InstallError(f"Python >= {wanted} is needed, {sys.executable} is {found}")
        with tempfile.TemporaryDirectory(prefix="install_detectron2_") as work:
            install(args.sdist, args.force, Path(work))
    except (InstallError, OSError, tarfile.TarError) as error:
        print("install_detectron2.py: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2.py: interrupted; run it again to finish", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
