"""`python -m megablocks.huggingface check DIRECTORY`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers.utils import logging

from megablocks.huggingface.check import check_directory

_ENDS = """\
exit codes:
  0  every directory loads, and an ordinary call computes what transformers 4.40.2 computed
  1  every directory loads, but some model computes something else in every call
  2  some directory does not load, or the command was not understood
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megablocks.huggingface", description="Mega models of transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="tell whether a directory loads, what it is, and what differs from transformers 4.40.2",
        description="Tells whether a directory loads, what it is, and what differs from transformers 4.40.2.",
        epilog=_ENDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("directory", nargs="+", help="holds config.json and weights")
    given = parser.parse_args(arguments)

    logging.disable_progress_bar()
    status = 0
    for directory in given.directory:
        finding = check_directory(directory)
        print(directory)
        print("\n".join(finding.lines()))
        status = max(status, finding.status)
    return status


if __name__ == "__main__":
    sys.exit(main())
