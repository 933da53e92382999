"""
What the scripts of this project share: options of their command lines, reading a config, and ending
in one clear line.
"""

import argparse
import difflib
import functools
import math
import os
import re
import sys
from typing import Callable, List, Optional

import yaml
from cbbl_d2.config import add_cbbl_config
from cbbl_d2.devices import usable_device
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.yaml_checks import check_yaml
from detectron2.config import CfgNode, get_cfg


def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """
    A ``type`` for argparse, which checks it before anything is loaded: a finite number from ``low``
    to ``high``.

    Args:
        kind: int or float.
    """

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):
            name = "a whole number" if kind is int else "a number"
            limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {name} {limits}")
        return value

    return parse


def add_opts(parser: argparse.ArgumentParser) -> None:
    """``--opts``, the last on the line."""
    parser.add_argument(
        "--opts",
        help="Modify config options using the command-line 'KEY VALUE' pairs",
        default=[],
        nargs=argparse.REMAINDER,
    )


def load_config(config_file: str, opts: Optional[List[str]] = None) -> CfgNode:
    """
    Detectron2's defaults, the keys of this project, a YAML file and ``KEY VALUE`` overrides, in
    this order. The file is read with the safe YAML loader: a config cannot run code. Where torch
    finds no GPU, a ``MODEL.DEVICE`` "cuda" of the file or the defaults becomes "cpu".

    Args:
        config_file: path of the YAML file, or "" for the defaults alone.
        opts: ``[key, value, key, value, ...]`` as from the command line.

    Raises:
        ConfigError: no such file, malformed YAML, unknown key, a value of the wrong type, or a
            device that this machine has not.
    """
    cfg = get_cfg()
    add_cbbl_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise ConfigError(
                f"{config_file}: no such config file (working directory: {os.getcwd()})"
            )
        if config_file.endswith(".py"):
            raise ConfigError(
                f"{config_file}: a Lazy config: run python tools/lazyconfig_train_net.py "
                f"--config-file {config_file}, or give the YAML config of the same name"
            )
        check_yaml(config_file)
        try:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        except yaml.YAMLError as e:
            raise ConfigError(f"{config_file}: not valid YAML: {_one_line(e)}") from e
        except (KeyError, ValueError, TypeError, AssertionError, AttributeError) as e:
            raise ConfigError(f"{config_file}: {_explain(e, cfg)}") from e
    if opts:
        if len(opts) % 2 != 0:
            options = [word for word in opts if word.startswith("--")]
            raise ConfigError(
                f"overrides must come as KEY VALUE pairs, but there is an odd number of words "
                f"({' '.join(opts)})"
                + (f": put {' '.join(options)} before them" if options else "")
                + (": key=value is for Lazy configs" if any("=" in o for o in opts) else "")
            )
        try:
            cfg.merge_from_list(opts)
        except (KeyError, ValueError, TypeError, AssertionError, AttributeError) as e:
            raise ConfigError(f"command line: {_explain(e, cfg)}") from e
    unset = sorted(set(_keys(cfg, only_none=True)) - set(_keys(get_cfg(), only_none=True)))
    if unset:
        raise ConfigError(f"{config_file or 'command line'}: {unset[0]} has no value: give it one")
    # A config, which may have been written on another machine, falls back; a command line is meant.
    is_asked_for = "MODEL.DEVICE" in (opts or ())[::2]
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE, "MODEL.DEVICE", fall_back=not is_asked_for)
    return cfg


def one_line_errors(main: Callable) -> Callable:
    """
    Decorator for the ``main`` of a script: a :class:`UserError` is printed as ``error: ...``
    without a traceback and ends the program with exit status 1, Ctrl-C as ``interrupted`` with
    130. A reader that wants no more of the output (``| head``) ends it without a word. Other
    exceptions are bugs and keep their traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as e:
            print(f"error: {error_message(e)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt as e:
            print(str(e) or "interrupted", file=sys.stderr)
            sys.exit(getattr(e, "exit_status", 130))
        except BrokenPipeError:
            # Python flushes stdout once more at the end: let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return wrapped


def error_message(error: UserError) -> str:
    """The one line that the user reads, also of an error from a worker of a data loader."""
    # A data loader's worker sends its whole traceback as the message; the last line is ours.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Original Traceback" in str(error):
        return lines[-1].partition(": ")[2]
    return _one_line(error)


def _explain(error: Exception, cfg: CfgNode) -> str:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    message = _one_line(message)
    mismatch = re.fullmatch(
        r"Type mismatch \(<class '(\w+)'> vs\. <class '\w+'>\) with values \((.*) vs\. (.*)\) "
        r"for config key: (.*)",
        message,
    )
    if mismatch:
        kind, present, value, key = mismatch.groups()
        return f"{key} = {value}: must be of type {kind}, such as {present}"
    # yacs words it differently for a file and for the command line.
    if message.startswith("Non-existent "):
        key = message.rpartition(" ")[2]
        near = difflib.get_close_matches(key, _keys(cfg), n=1)
        message = f"unknown config key {key}" + (f"; did you mean {near[0]}?" if near else "")
    return message


def _keys(cfg: CfgNode, prefix: str = "", only_none: bool = False) -> List[str]:
    keys = []
    for key, value in cfg.items():
        if value is None or not only_none:
            keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_keys(value, f"{prefix}{key}.", only_none))
    return keys


def _one_line(message) -> str:
    return " ".join(str(message).split())
