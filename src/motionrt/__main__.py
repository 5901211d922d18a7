"""`python -m motionrt`: the `motionrt` command."""

from motionrt.runtime.cli.main import main

main()
