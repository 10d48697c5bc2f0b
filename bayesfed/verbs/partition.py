"""Show which client would hold which data.

usage: bayesfed partition [key=value ...] [out=DIR]

Splits the data as `bayesfed run` with the same overrides would, and writes clients.csv, partition.json and pictures.
"""

from __future__ import annotations


def main(args: list[str]) -> int:
    """Write and print what the split looks like."""
    from bayesfed.splits.command import partition

    partition(args)
    return 0
