"""Which part may import which: a part knows those below it, never those above."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cbbl_d2"

# From the bottom up; what stands in one line does not know each other.
LAYERS = (
    ("errors", "messages"),
    ("devices", "files", "plain_pickle", "value_checks", "yaml_checks", "distribution"),
    ("config",),
    ("compat", "architectures"),
    ("modeling", "evaluation.rules"),
    ("data",),
    ("evaluation", "visualization"),
    ("engine",),
    ("inference", "dataset_report"),
    ("analysis", "export"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """``cbbl_d2.data.datasets.visdrone`` -> "data"."""
    names = module.split(".")[1:]
    two = ".".join(names[:2])
    return two if two in LEVEL else names[0] if names else ""


def imports_of(path: Path) -> set[str]:
    """Names of the modules of this package that a file imports, anywhere in it."""
    package = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    known = {
        ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for p in PACKAGE.rglob("*.py")
    }
    return {name for name in found if name in known and name != "cbbl_d2"}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_part_imports_one_above_it(path):
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    mine = part_of(module.removesuffix(".__init__"))
    assert mine in LEVEL, f"{mine}: give it a place in LAYERS"
    for name in imports_of(path):
        other = part_of(name)
        if other != mine and not mine.startswith(f"{other}.") and not other.startswith(f"{mine}."):
            assert LEVEL[other] < LEVEL[mine], f"{module} imports {name}"


def test_rules_of_an_evaluation_know_neither_data_nor_evaluators():
    names = imports_of(PACKAGE / "evaluation" / "rules.py")
    assert all(part_of(name) in LAYERS[0] for name in names), names


def test_tools_are_imported_by_nothing():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not any(m.split(".")[0] in ("tools", "tests", "benchmarks") for m in modules), path
