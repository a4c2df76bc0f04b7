"""Converts a checkpoint of the original code into a directory that `megablocks.load` reads.

python -m megablocks.interop.fairseq INPUT OUTPUT [--truncation keep] [--force]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megablocks.interop.fairseq.architecture import build
from megablocks.interop.fairseq.reading import read
from megablocks.interop.fairseq.summary import summary
from megablocks.models import save


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m megablocks.interop.fairseq", description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="a .pt of the original code")
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument(
        "--truncation",
        choices=["auto", "keep"],
        default="auto",
        help="keep: truncate the averages of a language model as in its training (default: not at all, as evaluated)",
    )
    parser.add_argument("--force", action="store_true", help="replace a model that is already there")
    given = parser.parse_args(words)
    try:
        if given.output.exists() and not given.force:
            raise FileExistsError(f"{given.output} is already there; name another directory, or add --force.")
        checkpoint = read(given.input)
        model = build(checkpoint, truncation=given.truncation)
        save(model, given.output)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(checkpoint, model))
    print(f'written to {given.output}; read it by megablocks.load("{given.output}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
