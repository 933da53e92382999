"""Detectron2's ``launch``, on GPUs or on the CPU, whose processes end in one line together."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any, Callable

import torch
from cbbl_d2.compat import needs_gpu_to_launch
from cbbl_d2.devices import accelerator, device_kind
from cbbl_d2.errors import Stopped, UserError
from cbbl_d2.messages import count
from detectron2.engine import default_setup
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .cli import error_message
from .lost_process import has_lost_process, has_timed_out
from .stop import handle_signals

_GRACE = 5.0  # seconds


def launch(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """
    Run ``main(args)`` in ``args.num_gpus`` processes on each of ``args.num_machines`` machines; in
    this process if that makes one. Where torch finds no GPU the processes share the CPU and talk
    over gloo, which Detectron2's main branch can and v0.6 cannot.

    Args:
        main: an importable function: each process is started anew.
        args: from Detectron2's ``default_argument_parser``.
        timeout: how long a process waits for the others.

    Raises:
        UserError: that of the process which raised one first; too few GPUs; the processes cannot
            start; one was killed, or did not answer.
    """
    for option, least in (("num_gpus", 0), ("num_machines", 1), ("machine_rank", 0)):
        if getattr(args, option) < least:
            name = f"--{option.replace('_', '-')}"
            raise UserError(f"{name} {getattr(args, option)}: must be {least} or more")
    if args.num_gpus * args.num_machines <= 1:
        main(args)
        return
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < args.num_gpus:
        raise UserError(
            f"--num-gpus {args.num_gpus}: this machine has {num_gpus} GPUs that torch can use; "
            f"use --num-gpus {num_gpus}"
        )
    # torch would announce each process that it ends after another one has failed.
    logging.getLogger("torch.multiprocessing").setLevel(logging.ERROR)
    # When one process fails, the others fail in turn, having lost it. The first error is the cause.
    # A signal's number, or 0 for a UserError, and the line for the user.
    ended = multiprocessing.get_context("spawn").SimpleQueue()
    received = []

    def hand_on(number: int, _frame: Any) -> None:
        # Ctrl-C reaches them as well, but a signal sent to this process alone does not. They end
        # the training, and this process with it.
        received.append(number)
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    before = handle_signals(hand_on)
    try:
        detectron2_launch(
            _run_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args, timeout, ended),
            timeout=timeout,
        )
    except (ProcessExitedException, ProcessRaisedException) as e:
        if not ended.empty():
            number, message = ended.get()
            raise (Stopped(number, message) if number else UserError(message)) from e
        if received:
            raise Stopped(received[0], "stopped") from e
        _explain(e, args, timeout)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_log(cfg, args: argparse.Namespace, log_dir: str, device: str) -> None:
    """
    Detectron2's ``default_setup``, the log of this project beside its own, and a line that says so
    where there is no GPU.

    Args:
        cfg: YAML or Lazy config.
        log_dir: folder of the log, the same as in ``cfg``.
        device: that the model runs on.
    """
    default_setup(cfg, args)
    logger = setup_logger(log_dir, distributed_rank=comm.get_rank(), name="cbbl_d2")
    if device_kind(device) == "cpu" and accelerator() is None:
        processes = count(comm.get_world_size(), "process", "processes")
        logger.info(f"No GPU found: running on the CPU in {processes}.")


def _run_process(main: Callable, args: argparse.Namespace, timeout: timedelta, ended) -> None:
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # Each process would start a thread for every core, and they would wait for each other.
        torch.set_num_threads(max(1, torch.get_num_threads() // args.num_gpus))
    try:
        main(args)
    except UserError as e:
        ended.put((0, error_message(e)))
        sys.exit(1)
    except RuntimeError as e:
        if has_timed_out(e):
            ended.put((0, _no_answer(timeout)))
            sys.exit(1)
        if has_lost_process(e):
            time.sleep(_GRACE)  # what ends first is taken for the cause
        raise
    except Stopped as e:
        ended.put((e.number, str(e)))
        sys.exit(e.exit_status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    else:
        # Left to the end of the process, gloo's threads can abort it: a failure after all is done.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _no_answer(timeout: timedelta) -> str:
    return (
        "a process did not answer the others for "
        f"{count(int(timeout.total_seconds() // 60), 'minute', 'minutes')}: go on with "
        "--resume; if it did not hang and was only slow, raise SOLVER.PROCESS_TIMEOUT (which Lazy "
        "configs do not have)"
    )


def _explain(error: Exception, args: argparse.Namespace, timeout: timedelta) -> None:
    """Raises what the user should read instead of ``error``, if that is no bug."""
    if needs_gpu_to_launch(error):
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: there is no GPU, and "
            "the installed Detectron2 (v0.6) cannot start several processes without; its main "
            "branch can. Leave both out to run in one process on the CPU"
        ) from error
    if "EADDRINUSE" in str(error):
        raise UserError(
            f"--dist-url {args.dist_url}: another program, maybe another training, uses this port: "
            "choose a free one" + (", or --dist-url auto" if args.num_machines == 1 else "")
        ) from error
    if isinstance(error, ProcessRaisedException) and has_lost_process(str(error)):
        raise UserError(
            "a process on another machine has ended: what it has printed there may say why; go on "
            "with --resume"
        ) from error
    not_met = ("waiting for clients", "client socket has timed out")
    if isinstance(error, ProcessRaisedException) and any(w in str(error) for w in not_met):
        raise UserError(
            f"--dist-url {args.dist_url}: the processes did not find each other: start the same "
            f"command on all {args.num_machines} machines, with --machine-rank 0 on the one that "
            "--dist-url names, and a port that they can reach"
        ) from error
    if isinstance(error, ProcessExitedException):
        if error.exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise Stopped(error.exit_code - 128, "stopped") from error
        if error.signal_name == "SIGABRT" and torch.cuda.is_available():  # NCCL's way to time out
            raise UserError(f"{error}, see the lines above; maybe {_no_answer(timeout)}") from error
        if error.signal_name:
            raise UserError(
                f"{error}, maybe for lack of memory: lower SOLVER.IMS_PER_BATCH, or go on with "
                "--resume"
            ) from error
