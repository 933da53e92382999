"""Training, checkpoints that resume exactly, and what the scripts share."""

from .checkpoint import CBBLCheckpointer, load_weights
from .cli import load_config, one_line_errors
from .trainer import CBBLTrainer

__all__ = ["CBBLCheckpointer", "CBBLTrainer", "load_config", "load_weights", "one_line_errors"]
