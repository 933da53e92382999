import subprocess
import sys


def test_distribution_needs_torch_alone():
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import cbbl_d2.distribution\n"
        "assert not any(m.startswith('detectron2.') for m in sys.modules)\n"
        "import cbbl_d2\n"
        "try: cbbl_d2.add_cbbl_config\n"
        "except ModuleNotFoundError as e: print(e)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "tools/install_detectron2.py" in result.stdout
