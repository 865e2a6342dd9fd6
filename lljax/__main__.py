"""`python -m lljax`: as the command `lljax`."""

from lljax.cli.main import run

if __name__ == "__main__":
    run()
