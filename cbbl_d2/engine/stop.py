"""Ctrl-C and SIGTERM, which clusters send: a training ends with a checkpoint of where it is."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from cbbl_d2.errors import Stopped
from detectron2.engine import HookBase
from detectron2.utils import comm

from .hooks import ResumeState

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A terminal sends Ctrl-C to all processes, and the first of them hands it on once more.
_SAME_SIGNAL = 1.0  # seconds


def handle_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """
    Set the handler of SIGINT and SIGTERM. One that is ignored, as Ctrl-C is by what a shell runs in
    the background, stays so.

    Returns:
        the handlers before, by the number of the signal, of those that were set.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {n: h for n, h in before.items() if h != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


class StopRequest:
    """
    Notes the first SIGINT or SIGTERM while it is entered; the second one acts as it always does.
    In another than the main thread, where Python allows no handlers, it notes nothing.

    Attributes:
        number: of the signal; 0 before.
        raised: whether it has raised :class:`Stopped`, see :meth:`at_once`.
    """

    def __init__(self) -> None:
        self.number = 0
        self.raised = False
        self._at_once = False
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = handle_signals(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at_once(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """
        A function that takes long and need not be awaited: a signal ends it, by raising
        :class:`Stopped`. (Not in several processes, which wait for each other in it.)
        """

        def interruptible() -> Any:
            self._at_once = comm.get_world_size() == 1
            try:
                return function()
            finally:
                self._at_once = False

        return interruptible

    def _note(self, number: int, _frame: Any) -> None:
        if self.number and time.monotonic() - self._time < _SAME_SIGNAL:
            return
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.number, self._time = number, time.monotonic()
        if self._at_once:
            self.raised = True
            raise Stopped(number)


class StopOnRequest(HookBase):
    """
    After the iteration in which a :class:`StopRequest` was noted, in any process: write a
    checkpoint, as :class:`detectron2.engine.hooks.PeriodicCheckpointer` does, and end the training.

    To be registered on all processes, after :class:`ResumeState`.
    """

    def __init__(self, request: StopRequest, resume_state: ResumeState):
        self._request = request
        self._resume_state = resume_state

    def after_step(self) -> None:
        number = max(comm.all_gather(self._request.number))
        if number:
            self.stop(number)

    def stop(self, number: int) -> None:
        """
        Raises:
            Stopped: in every process, after the checkpoint has been written.
        """
        trainer = self.trainer
        is_last = trainer.iter + 1 >= trainer.max_iter
        name = "model_final" if is_last else f"model_{trainer.iter:07d}"
        self._resume_state.gather()
        trainer.checkpointer.save(name, iteration=trainer.iter)
        # The first process that ends takes the others with it.
        comm.synchronize()
        raise Stopped(
            number,
            f"stopped by {signal.Signals(number).name} after iteration {trainer.iter}: the same "
            "command with --resume goes on from there",
        )
