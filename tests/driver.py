"""
Runs scripts of this repository, each in a process of its own that has imported everything already.
Reads ``[[name, script, arguments...], ...]`` as JSON, writes ``{name: exit status}``; the output of
each goes to ``NAME.out`` and ``NAME.err`` in the working directory.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SECONDS = 60  # for each


def run_scripts(cases: list[list[str]], folder: Path) -> dict[str, int]:
    """
    Args:
        cases: name, script (relative to the repository) and arguments of each.
        folder: the working directory.

    Returns:
        name -> exit status.
    """
    result = subprocess.run(
        [sys.executable, __file__, str(ROOT)],
        input=json.dumps(cases),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    root = sys.argv[1]
    sys.path[:0] = [root, os.path.join(root, "tools")]
    import analyze_gradients  # noqa: F401
    import check_dataset  # noqa: F401
    import compare  # noqa: F401
    import predict  # noqa: F401
    import run_study  # noqa: F401

    import train_net  # noqa: F401

    status = {}
    for name, script, *arguments in json.load(sys.stdin):
        pid = os.fork()
        if pid == 0:
            code = 0
            signal.alarm(SECONDS)
            for stream, number in (("out", 1), ("err", 2)):
                file = os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
            sys.argv = [os.path.join(root, script), *arguments]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(e.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps(status))
