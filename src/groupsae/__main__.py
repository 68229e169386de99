"""The program, `groupsae` or `python -m groupsae`: the command line behind its slow imports."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an interrupt is met from the first import on."""
    try:
        from groupsae.cli import main as command_line
    except KeyboardInterrupt:
        sys.stderr.write("groupsae: interrupted\n")
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
