"""Training, checkpoints that resume exactly, and what the scripts share."""

from .checkpoint import CBBLCheckpointer, load_weights
from .cli import load_config, one_line_errors
from .config_checks import check_engine_config, check_model_config
from .evaluate import evaluate_weights
from .launch import launch, start_log
from .output_dir import claimed, config_restored
from .trainer import CBBLTrainer

__all__ = [
    "CBBLCheckpointer",
    "CBBLTrainer",
    "check_engine_config",
    "check_model_config",
    "claimed",
    "config_restored",
    "evaluate_weights",
    "launch",
    "load_config",
    "load_weights",
    "one_line_errors",
    "start_log",
]
