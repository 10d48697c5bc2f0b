"""Run on real clients, through a Flower SuperLink.

usage: bayesfed deploy SUPERLINK key=value ...

SUPERLINK names a connection of $FLWR_HOME/config.toml. Overrides are those of `bayesfed run`; hydra.run.dir=DIR (a new
run) or resume=DIR (one that goes on) is the run directory on the server, relative to its $BAYESFED_RUNS.
More: docs/deployment.md
"""

from __future__ import annotations


def main(args: list[str]) -> int:
    """Submit a run and follow it."""
    from bayesfed.deployment.command import deploy

    return deploy(args)
