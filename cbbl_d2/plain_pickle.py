"""Pickle files as others wrote them, which run code when they are loaded unless one looks first."""

import codecs
import collections
import pickle
from typing import Any

import numpy as np
from cbbl_d2.errors import UserError
from detectron2.structures import BoxMode

__all__ = ["check_pickle"]


def check_pickle(path: str) -> None:
    """
    Unpickle a file, of Detectron2's model zoo or of precomputed proposals, with nothing in it but
    NumPy arrays and plain containers, numbers and text: where that works, Detectron2's own loading
    runs no code of the file either.

    Args:
        path: a local file.

    Raises:
        UserError: there is something else in it, or it is no pickle.
        OSError: it cannot be read.
    """
    with open(path, "rb") as f:
        try:
            _Unpickler(f, encoding="latin1").load()
        except _NotPlain as e:
            raise UserError(
                f"{path}: holds {e}, which would run code of the file: not loaded. Only arrays and "
                "plain values are"
            ) from e
        except OSError:
            raise
        except Exception as e:  # a damaged pickle can make the machine raise anything
            raise UserError(f"{path}: not a pickle of arrays, or damaged") from e


class _NotPlain(Exception):
    pass


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes. Other encodings are those of codecs, which are programs."""
    if encoding != "latin1":
        raise _NotPlain(f"the codec {encoding}")
    return codecs.encode(text, encoding)


def _scalar(dtype: np.dtype, data: Any = b"") -> Any:
    """A NumPy number. (Of an object NumPy would unpickle the content.)"""
    if dtype.hasobject:
        raise _NotPlain("a NumPy object")
    return np.frombuffer(data, dtype)[0]


def _reconstruct(kind: type, shape: tuple, code: bytes) -> np.ndarray:
    """An empty array, which is filled by its own ``__setstate__``."""
    if kind is not np.ndarray:
        raise _NotPlain(f"the array type {kind}")
    return np.ndarray.__new__(kind, shape, code)


def _frombuffer(buffer: Any, dtype: np.dtype, shape: tuple, order: str, *rest: Any) -> np.ndarray:
    """How protocol 5 writes arrays."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _member(kind: type, name: str) -> BoxMode:
    """How Python 3.11.0 to 3.11.3 write a member of an enumeration."""
    if kind is not BoxMode or name not in BoxMode.__members__:
        raise _NotPlain(f"builtins.getattr of {kind}")
    return BoxMode[name]


class _Unpickler(pickle.Unpickler):
    _ALLOWED = {
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("detectron2.structures.boxes", "BoxMode"): BoxMode,
        ("builtins", "getattr"): _member,
        ("__builtin__", "getattr"): _member,
        **{
            (f"numpy.{core}.{module}", function.__name__.removeprefix(cut)): function
            for core in ("core", "_core")  # before and since NumPy 2
            for module, function, cut in (
                ("multiarray", _reconstruct, ""),
                ("multiarray", _scalar, "_"),
                ("numeric", _frombuffer, ""),
            )
        },
        **{
            (module, kind.__name__): kind
            for module in ("builtins", "__builtin__")
            for kind in (set, frozenset, complex, bytes, bytearray)
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise _NotPlain(f"{module}.{name}") from None

    def persistent_load(self, id: Any) -> Any:
        raise _NotPlain("a reference to another file")
