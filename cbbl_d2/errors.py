"""Errors that are the user's to mend: one clear line, no traceback needed."""


class UserError(ValueError):
    """
    Something outside the program is wrong: a config value, a file, an annotation, a command line.

    The message is one line that names the file, key or value and the cure. ``train_net.py`` and
    the scripts in ``tools/`` print it without a traceback.
    """


class ConfigError(UserError):
    """A config key holds an impossible value. The message names key, value and what is allowed."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the program, which has put its things in order."""

    def __init__(self, number: int, message: str = "interrupted"):
        """
        Args:
            number: of the signal; the exit status is conventionally 128 more.
        """
        super().__init__(message)
        self.number = number
        self.exit_status = 128 + number
