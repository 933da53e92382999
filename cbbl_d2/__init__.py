"""
C-BBL, Confidence-driven Bounding Box Localization for small object detection, as a Detectron2
project. Importing this package registers its models and its data sets with Detectron2.

Without Detectron2 only :mod:`cbbl_d2.distribution`, which is pure torch, can be used.
"""

import warnings

__version__ = "0.1.0"

__all__ = ["__version__", "add_cbbl_config"]

# fvcore and Detectron2 script some functions when they are imported, which today's torch calls
# deprecated; nobody who reads the warning can do anything about it.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated")
    try:
        import detectron2  # noqa: F401
    except ModuleNotFoundError as e:
        if e.name != "detectron2":  # Detectron2 is there, but something that it needs is not
            raise

        def __getattr__(name: str):
            if name in ("add_cbbl_config", "data", "modeling"):
                raise ModuleNotFoundError(
                    f"cbbl_d2.{name} needs Detectron2, which is not installed here: run `python "
                    "tools/install_detectron2.py`, or install it as its own documentation says",
                    name="detectron2",
                )
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    else:
        from . import data, modeling  # noqa: F401  (registers data sets and models)
        from .config import add_cbbl_config
