"""YAML files that a loader would take wrong, or never be done with, found by their structure."""

import os

import yaml
from cbbl_d2.errors import ConfigError

__all__ = ["check_yaml"]

# What the references of a file come to; a config has a few hundred values. Ten lines of which each
# refers nine times to the one before stand for a billion.
_MAX_VALUES = 1_000_000


def check_yaml(path: str, plain_keys: bool = True) -> None:
    """
    Args:
        path: of a YAML file with keys, which may name others by ``_BASE_``, as Detectron2's do.
        plain_keys: refuse keys that are no text.

    Raises:
        ConfigError: it cannot be read, is empty or no mapping, has a key twice, or a key that is no
            text; it refers to itself, or to so much that it would never be loaded.
    """
    _check(path, plain_keys, ())


def _check(path: str, plain_keys: bool, derived: tuple[str, ...]) -> None:
    name = f"{derived[-1]}: its _BASE_ {path}" if derived else path
    if os.path.realpath(path) in derived:
        raise ConfigError(f"{name} is based on itself: remove one _BASE_")
    try:
        with open(path, encoding="utf-8") as f:
            root = yaml.compose(f, Loader=yaml.SafeLoader)
    except FileNotFoundError as e:
        raise ConfigError(f"{name} does not exist") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{name}: cannot be read ({getattr(e, 'strerror', '') or e})") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(e).split())}") from e
    except RecursionError as e:
        raise ConfigError(f"{name}: nested too deeply for a config") from e
    if not isinstance(root, yaml.MappingNode):
        what = "it is empty" if root is None else f"at the top it has a {root.id}"
        raise ConfigError(f"{name}: not a config: {what}, and must have KEY: value")
    _check_keys(root, name, plain_keys)
    _count(root, name, {})
    for key, value in root.value:
        if key.value == "_BASE_":
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                base = os.path.expanduser(str(base.value))
                if "://" not in base:
                    base = os.path.join(os.path.dirname(path), base)
                    _check(base, plain_keys, (*derived, os.path.realpath(path)))


def _check_keys(root: yaml.Node, name: str, plain: bool) -> None:
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if plain and key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise ConfigError(f"{name}, line {line}: the key {key.value} is no text: quote it")
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise ConfigError(
                    f"{name}, line {line}: the key {key.value} stands in line {lines[key.value]} "
                    "already: the first one would be lost, join them"
                )
            lines[key.value] = line
            todo.append(value)


def _count(node: yaml.Node, name: str, known: dict[int, int]) -> int:
    """How many values a node stands for, references included."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1  # of itself, in the meantime
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [x for pair in parts for x in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count(part, name, known) for part in parts)
    if known[id(node)] > _MAX_VALUES:
        raise ConfigError(
            f"{name}: its references (& and *) stand for more than {_MAX_VALUES} values, or for "
            "themselves: write out what is meant"
        )
    return known[id(node)]
