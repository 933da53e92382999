"""
Laws of the documentation: a documented command is one that its program takes, with a config that
exists and keys that are known; links lead to existing files and headings; targets of make exist.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"train_net\.py|(tools|benchmarks)/\w+\.py")
OPERATORS = {"&&", "||", "|", ";", "&"}


class Wrong(AssertionError):
    """What is documented is not so."""


# -- reading the pages -----------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def shell_text(text: str) -> str:
    """Blocks of bash, and indented lines that start a Python program."""
    indented = re.findall(r"^ {4}(python \S+\.py.*)$", prose(text), re.MULTILINE)
    return "\n".join([*blocks(text, "bash"), *indented])


def commands(shell: str) -> list[list[str]]:
    """Simple commands as words: continued lines joined, without comments and NAME=value."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in OPERATORS:
                found.append(words)
                words = []
            elif words or not re.match(r"[A-Z_]\w*=", word):
                words.append(word)
    return [words for words in found if words]


def python_commands(text: str) -> list[list[str]]:
    """Those that run a program of this project, from its path on."""
    return [
        words[1:]
        for words in commands(shell_text(text))
        if words[0] in ("python", "python3") and len(words) > 1 and PROGRAM.fullmatch(words[1])
    ]


def is_config(yaml_text: str) -> bool:
    keys = re.findall(r"^(\w+):", yaml_text, re.MULTILINE)
    return bool(keys) and all(key == "_BASE_" or key.isupper() for key in keys)


def created_configs(text: str) -> dict[str, str]:
    """Files that the reader is told to write: blocks of YAML that begin with `# name.yaml`."""
    found = {}
    for block in blocks(text, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        if name and is_config(block):
            found[name[1]] = block
    return found


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.strip())
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


# -- checks ----------------------------------------------------------------------------------------


class Parsed(Exception):
    """Ends a program with what its command line was read as."""


def parse(words: list[str], monkeypatch) -> argparse.Namespace | None:
    """
    The command line as the program's own parser reads it; None if it asks for help.

    Raises:
        Wrong: there is no such program, or it does not take this command line.
    """
    if not (ROOT / words[0]).is_file():
        raise Wrong(f"{words[0]}: no such program")
    init, parse_args = argparse.ArgumentParser.__init__, argparse.ArgumentParser.parse_args

    def without_abbreviations(parser, *args, **kwargs):
        init(parser, *args, **{**kwargs, "allow_abbrev": False})

    def stop(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, args, namespace))

    def error(parser, message):
        raise Wrong(message)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "__init__", without_abbreviations)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as exit:
            if exit.code in (0, None):
                return None
            raise Wrong(f"ended with {exit.code}") from exit
    raise Wrong("ended without reading its command line")


def check_yaml_config(path: str, overrides: list[str]) -> None:
    from cbbl_d2.engine import load_config
    from cbbl_d2.errors import ConfigError

    try:
        load_config(path, overrides)
    except ConfigError as e:
        raise Wrong(str(e)) from e


def check_lazy_config(path: str, overrides: list[str]) -> None:
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise Wrong(f"{path}: no such config file")
    cfg = LazyConfig.load(path)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or OmegaConf.select(cfg, key, default=Wrong) is Wrong:
            raise Wrong(f"{override}: no key=value with a key of {path}")


def check_command(words: list[str], monkeypatch) -> None:
    """
    Args:
        words: a program and its arguments. Paths of configs are relative to the working directory.
    """
    args = parse(words, monkeypatch)
    if args is None:
        return
    paths = getattr(args, "config_file", None) or ""
    overrides = getattr(args, "opts", None) or []
    for path in paths if isinstance(paths, list) else [paths]:
        if path.startswith("output/"):  # a training writes it
            path = ""
        is_lazy = path.endswith(".py") and "lazy" in words[0]
        (check_lazy_config if is_lazy else check_yaml_config)(path, overrides)
    study = getattr(args, "study", None)
    if study and not (ROOT / study).is_file():
        raise Wrong(f"{study}: no such study")


@pytest.fixture
def check(monkeypatch, tmp_path):
    """``check(words)`` in a folder with this project's configs and those that the pages create."""
    pytest.importorskip("detectron2")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for page in reversed(PAGES):
        for name, text in created_configs(page.read_text("utf-8")).items():
            (tmp_path / name).write_text(text, "utf-8")
    return lambda words: check_command(words, monkeypatch)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


@each_page
def test_commands(page, check):
    wrong = []
    for words in python_commands(page.read_text("utf-8")):
        try:
            check(words)
        except Wrong as e:
            wrong.append(f"{shlex.join(words)}\n    {e}")
    assert not wrong, "\n".join(["", *wrong])


@each_page
def test_config_files(page, check, tmp_path):
    """The YAML that a page shows loads as a config."""
    for block in blocks(page.read_text("utf-8"), "yaml"):
        if is_config(block):
            (tmp_path / "shown.yaml").write_text(block, "utf-8")
            check_yaml_config("shown.yaml", [])


@each_page
def test_make_targets(page):
    text = page.read_text("utf-8")
    used = {words[1] for words in commands(shell_text(text)) if words[0] == "make" and words[1:]}
    used |= set(re.findall(r"`make ([a-z-]+)", text))
    known = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert used <= set(" ".join(known).split())


@each_page
def test_links(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(file.read_text("utf-8")):
            broken.append(target)
    assert not broken


# -- the checks themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        ("python train_net.py --config-fil configs/SmallShapes/cbbl.yaml", "--config-fil"),
        ("python train_net.py --config-file configs/SmallShapes/cbbl.yaml --resum", "--resum"),
        ("python train_net.py --config-file configs/SmallShapes/cbl.yaml", "no such config"),
        (
            "OMP_NUM_THREADS=1 python train_net.py \\\n    --config-file "
            "configs/SmallShapes/cbbl.yaml SOLVER.MAXITER 3  # too short",
            "unknown config key SOLVER.MAXITER",
        ),
        (
            "cd there && python train_net.py --config-file configs/SmallShapes/cbbl.yaml SEED",
            "odd number",
        ),
        (
            "python tools/predict.py --weights w --input a --opts MODEL.CBBL.ALPA 3.0",
            "unknown config key MODEL.CBBL.ALPA",
        ),
        ("python tools/predict.py --weights w --input a --batch-size 0", "--batch-size"),
        ("python tools/predict.py --weights w", "required"),
        ("python tools/run_study.py tools/studies/none.yaml", "no such study"),
        ("python tools/analyze_gradients.py curve", "invalid choice"),
        ("python tools/none.py", "no such program"),
    ],
)
def test_a_wrong_command_is_found(line, message, check):
    (words,) = python_commands(f"Text\n```bash\n{line}\n```\n")
    with pytest.raises(Wrong, match=re.escape(message)):
        check(words)


@pytest.mark.parametrize("override", ["train.max_itr=3", "train.max_iter"])
def test_a_wrong_override_of_a_lazy_config_is_found(override, check):
    check_lazy_config("configs/SmallShapes/cbbl.py", ["train.max_iter=3"])
    with pytest.raises(Wrong, match=re.escape(override)):
        check_lazy_config("configs/SmallShapes/cbbl.py", [override])


def test_commands_are_read_as_bash_does():
    text = (
        "    python tools/a.py 'two words'\n```bash\n# python tools/no.py\n"
        'A=1 B=2 python tools/b.py --x "(1, 2)" \\\n    y.yaml # and\n'
        "source x && python tools/c.py 'more/*.png' | head\n```\n"
        "```python\npython tools/no.py\n```\n"
    )
    assert python_commands(text) == [
        ["tools/b.py", "--x", "(1, 2)", "y.yaml"],
        ["tools/c.py", "more/*.png"],
        ["tools/a.py", "two words"],
    ]


def test_anchors_are_those_of_github():
    text = "# What it costs\n```bash\n# no heading\n```\n## `a_b`, [c](d.md): e-f!\n## A\n## A\n"
    assert anchors(text) == {"what-it-costs", "a_b-c-e-f", "a", "a-1"}
