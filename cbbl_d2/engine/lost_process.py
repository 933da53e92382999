"""How gloo and NCCL say that another process of a training is no longer there."""


def has_timed_out(error: BaseException | str | None) -> bool:
    """Whether a process has waited for another one in vain, as gloo and NCCL say it."""
    words = ("Timed out waiting", "Application timeout caused", "operation timeout")
    return any(w in str(error) for w in words)


def has_lost_process(error: BaseException | str | None) -> bool:
    """Whether a process has found that another one has ended, as gloo and NCCL say it."""
    text = str(error)
    return "remote process exited" in text or ("gloo/transport" in text and "by peer" in text)
