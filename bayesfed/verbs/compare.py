"""Run all combinations of comma lists and compare the methods.

usage: bayesfed compare key=a,b ... [out=DIR] [jobs=N] [baseline=METHOD] [target=PERCENT] [budget=none] [tune=N]

Runs all combinations of the comma lists (the overrides of `bayesfed run`) side by side, and writes a table, figures
and report.html.
  out        folder; the same command again goes on with what is missing there
  jobs       runs at once; one a core if left out
  baseline   method that the others are tested against; the first if left out
  target     accuracy in percent: what it took to reach it
  budget     epochs (refuses methods with unequal rounds and epochs) or none
  tune       trials per method on a validation split before the comparison; tune_seed, tune_for=accuracy|nll steer them
More: docs/compare.md
"""

from __future__ import annotations

import sys


def main(args: list[str]) -> int:
    """A comparison's outcome as an exit code.

    Raises:
        InputError: bad input, before any run starts.
    """
    from bayesfed.compare.command import compare

    try:
        return compare(args)
    except KeyboardInterrupt:
        print("\ninterrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:  # the disk is full, or the folder went away
        print(f"failed: {error}; start the same command again to go on", file=sys.stderr)
        return 1
