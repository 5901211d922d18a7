"""`python -m motionrt`: the `motionrt` command."""

from motionrt.cli import main

main()
