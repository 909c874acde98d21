"""The base of every error that a user can mend, and how commands say it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where, and what to do, in one line; entry points print it and exit with 1."""


def report_errors(command: str, run: Callable[[], int], if_interrupted: str) -> int:
    """Runs a command; a user's mistake and Ctrl-C are one line each.

    Args:
      command: its name.
      run: does the work and returns the exit status.
      if_interrupted: what became of the work, for the line about an interruption.

    Returns:
      The exit status.
    """
    try:
        return run()
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted; {if_interrupted}", file=sys.stderr)
        return 130
