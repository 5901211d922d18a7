"""`motionrt`, and `python -m motionrt`: the command.

Ctrl-C is taken care of before anything is imported: imports take a fifth of a second, in which it would be a traceback. What
is left is Python's own start, the first hundredth.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130  # exit status, as of a shell: 128 and the number of the signal


def stop(number: int, frame: FrameType | None) -> None:
    """End the process at once: nothing is half done yet, or everything is done."""
    try:
        os.write(2, b"motionrt: interrupted.\n")
    finally:  # standard error may be closed
        os._exit(INTERRUPTED)


def main() -> None:
    """Run the command with the arguments of the process, and end it; see `motionrt.runtime.cli.common.run_app`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: a job in the background
        signal.signal(signal.SIGINT, stop)
    from motionrt.runtime.cli.main import main as command

    command()


if __name__ == "__main__":
    from motionrt.__main__ import main as once  # this file is a second module by its own name, which others import

    once()
