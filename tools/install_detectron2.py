#!/usr/bin/env python3
"""Make `import detectron2` work in the current Python environment, from PyPI alone.

If Detectron2 is already here it is left alone. Otherwise this installs the Python part of
Detectron2 v0.6 under its own name, as a normal wheel that `pip show detectron2` and
`pip uninstall detectron2` know about:

1. pip downloads `pb1-detectron2` 0.6, a third party's upload of the v0.6 tag (PyPI has no
   `detectron2`). Its SHA-256 is pinned below, and its setup.py is never run.
2. The documented FIXUPS below are applied, so that it runs on today's NumPy, Pillow and torch.
3. `detectron2._C`, the compiled extension, is replaced by a stand-in whose operations raise an
   error that names the operation. Detectors with axis-aligned boxes do not need it: NMS and
   ROIAlign come from torchvision. Deformable convolution and rotated boxes do.
"""

# Standard library only, and nothing at import that Python 3.6 does not know: a Python that is
# too old is to be told so by this file and not by a SyntaxError.
import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections import namedtuple
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
PROJECTS = {
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}

# Exactly `count` occurrences of `old` in `path` become `new`; any other number is an error.
FixUp = namedtuple("FixUp", "path old new count why")

_NUMPY = "NumPy 1.24 removed its aliases of Python's own types"
_PILLOW = "Pillow 10 removed LINEAR, an alias of BILINEAR"
_MESHGRID = "torch asks for an explicit indexing; 'ij' is what it did by default"
_NO_SETUPTOOLS = "setuptools 81 removed pkg_resources"
_NO_OPS = "this build has no compiled operations"
_NO_CAFFE2 = "torch removed caffe2, which the tracing of detectron2.export does not need"

FIXUPS = (
    FixUp("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1, _PILLOW),
    FixUp("detectron2/data/build.py", "dtype=np.int)", "dtype=int)", 1, _NUMPY),
    FixUp("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n", 1, _NUMPY),
    FixUp("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", 1, _NUMPY),
    FixUp("detectron2/evaluation/pascal_voc_evaluation.py", "(np.bool)", "(bool)", 2, _NUMPY),
    FixUp("detectron2/evaluation/sem_seg_evaluation.py", "=np.int)", "=int)", 2, _NUMPY),
    FixUp("detectron2/evaluation/sem_seg_evaluation.py", "=np.float)", "=float)", 2, _NUMPY),
    FixUp("detectron2/evaluation/sem_seg_evaluation.py", "(np.float)", "(float)", 3, _NUMPY),
    FixUp("detectron2/structures/masks.py", "(np.bool)", "(bool)", 2, _NUMPY),
    FixUp("detectron2/structures/masks.py", "=np.bool)", "=bool)", 1, _NUMPY),
    FixUp("detectron2/utils/video_visualizer.py", "=np.bool)", "=bool)", 1, _NUMPY),
    FixUp("detectron2/utils/visualizer.py", "(np.bool)", "(bool)", 3, _NUMPY),
    FixUp(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        1,
        _MESHGRID,
    ),
    FixUp(
        "detectron2/modeling/meta_arch/retinanet.py",
        "get_norm(norm, 1)",
        "get_norm(norm, 32)",
        1,
        "torch 1.10 checks that GroupNorm's channels fit its 32 groups; main has 32 as well",
    ),
    FixUp("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", "", 1, _NO_SETUPTOOLS),
    FixUp(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", ',
        "os.path.join(\n        os.path.dirname(os.path.abspath(__file__)), ",
        1,
        _NO_SETUPTOOLS,
    ),
    FixUp("detectron2/export/__init__.py", "from .api import *\n", "", 1, _NO_CAFFE2),
    FixUp(
        "detectron2/modeling/roi_heads/cascade_rcnn.py",
        "        box_features = _ScaleGradient.apply(",
        "        if self.training:\n            box_features = _ScaleGradient.apply(",
        1,
        "torch cannot save Python functions of a trace; the main branch has this condition, too",
    ),
    FixUp(
        "detectron2/layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        "    from detectron2 import _C\n\n    return _C.nms_rotated(",
        1,
        _NO_OPS + ": the stand-in says so, torch.ops would not",
    ),
    FixUp(
        "detectron2/evaluation/coco_evaluation.py",
        "self._use_fast_impl = use_fast_impl\n",
        "self._use_fast_impl = False  # the fast evaluation is compiled\n",
        1,
        _NO_OPS + ": fall back to pycocotools' own evaluation, as Detectron2's main branch does",
    ),
)

CHANGED_NOTICE = "# Changed from Detectron2 v0.6 by cbbl_d2's tools/install_detectron2.py.\n"

STUB_MARK = "Stand-in for Detectron2's compiled extension, written by install_detectron2.py."
STUB = f'''"""{STUB_MARK}

This is the pure Python build of Detectron2 v0.6. Asking this module for a compiled operation
raises MissingOpError; `hasattr(_C, "...")` is False, so code can test for an operation.
"""


class MissingOpError(AttributeError):
    """A compiled operation of Detectron2 was asked for; this build has none."""


def get_compiler_version():
    return "none (pure Python build)"


def get_cuda_version():
    return "none (pure Python build)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    raise MissingOpError(
        f"detectron2._C.{{name}} is a compiled operation and this is the pure Python build of "
        "Detectron2: install a full build, from conda-forge or from source ({FULL_BUILD})"
    )
'''

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

# What does this environment import as `detectron2`? Prints one JSON object as its last line.
PROBE = """
import importlib.util, json, os
found = {"here": False}
try:
    spec = importlib.util.find_spec("detectron2")
    if spec is not None and spec.origin:  # without an origin: a folder that only has the name
        found = {"here": True, "location": os.path.dirname(spec.origin), "full": False}
        import detectron2, detectron2.layers, detectron2.modeling
        found["version"] = detectron2.__version__
        try:
            from detectron2 import _C
            found["full"] = hasattr(_C, "InstanceAnnotation")
        except ImportError:
            pass
except Exception as e:
    found["error"] = f"{type(e).__name__}: {e}"
print()
print(json.dumps(found))
"""

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, flush=True)
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


def check_prerequisites(work, names):
    """Fail before anything is changed if one of the modules `names` cannot be imported."""
    process = run(["-c", IMPORT_ALL, *names], work)
    if process.returncode:
        name = next(name for name in names if name not in process.stdout.split())
        cure = "ensurepip" if name == "pip" else f"pip install {name}"
        raise InstallError(
            f"cannot import {name} ({reason(process)}): run `{sys.executable} -m {cure}`"
        )


def probe(work):
    """What this environment imports as `detectron2`; see PROBE."""
    process = run(["-c", PROBE], work)
    try:
        return json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # for example a segmentation fault in a compiled extension
        error = f"the import ended Python with status {process.returncode}"
        return {"here": True, "location": "this environment", "error": error}


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


def apply_fixups(files, fixups=FIXUPS):
    """A copy of `files` with every fix-up applied; one that does not fit is an error."""
    files, changed = dict(files), set()
    for fix in fixups:
        text = files.get(fix.path, b"").decode("utf-8")
        count = text.count(fix.old)
        if count != fix.count:
            raise InstallError(
                f"fix-up of {fix.path} ({fix.why}): {fix.old!r} is there {count} times instead of "
                f"{fix.count}, so this is not the source of v0.6; nothing was installed"
            )
        files[fix.path] = text.replace(fix.old, fix.new).encode("utf-8")
        changed.add(fix.path)
    for path in changed:  # Detectron2's licence asks for a notice in changed files
        files[path] = CHANGED_NOTICE.encode("utf-8") + files[path]
    return files


def wheel_contents(files):
    """The files of the wheel, in the order in which pip will write them."""
    contents = {"detectron2/_C.py": STUB.encode("utf-8")}  # first: see remove_leftovers
    for path, data in sorted(files.items()):
        for folder, package in PROJECTS.items():
            if path.startswith(folder + "/"):
                path = package + path[len(folder) :]
        if path.startswith("detectron2/"):
            contents[path] = data
    info = f"detectron2-{WHEEL_VERSION}.dist-info/"
    contents[info + "METADATA"] = METADATA.encode("utf-8")
    contents[info + "WHEEL"] = WHEEL.encode("utf-8")
    contents[info + "top_level.txt"] = b"detectron2\n"
    contents[info + "LICENSE"] = files["LICENSE"]
    return contents


def write_wheel(contents, folder):
    """Write `contents` and their RECORD as a wheel into `folder`; return its path."""
    name = f"detectron2-{WHEEL_VERSION}"
    record_path = f"{name}.dist-info/RECORD"
    record = []
    for path, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
        record.append(f"{path},sha256={digest.decode('ascii')},{len(data)}\n")
    record.append(record_path + ",,\n")
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
        archive.writestr(record_path, "".join(record))
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
    found = probe(work)
    if found["here"] and not force:
        if "error" in found:
            raise InstallError(
                f"Detectron2 is installed in {found['location']} but cannot be imported "
                f"({found['error']}): repair it, or replace it by running this with --force"
            )
        kind = "full build" if found["full"] else "pure Python, without compiled operations"
        print(f"Detectron2 {found['version']} is already in {found['location']} ({kind}).")
        return
    check_prerequisites(work, ["pip", "torch", "torchvision"])
    print("[2/5] Getting the source archive of Detectron2 v0.6", flush=True)
    files = read_sdist(download_sdist(work) if sdist is None else sdist)
    print(f"[3/5] Building a wheel with {len(FIXUPS)} fix-ups", flush=True)
    wheel = write_wheel(wheel_contents(apply_fixups(files)), work)
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
