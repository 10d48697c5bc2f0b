"""What ``bayesfed --help`` and ``bayesfed VERB --help`` say."""

from __future__ import annotations

VERBS = {
    "run": "simulate federated training (the verb may be left out)",
    "profile": "the same, and say where the time went",
    "compare": "run all combinations of comma lists and compare the methods",
    "partition": "show which client would hold which data",
    "deploy": "run on real clients, through a Flower SuperLink",
    "status": "say how a run stands",
    "list": "list the runs below a folder",
}

USAGE = {
    "run": """usage: bayesfed [run] [key=value ...]          bayesfed -m key=a,b ...          bayesfed --cfg job key=value ...

Simulates the federation that the configuration describes; results go to a new folder below runs/ (hydra.run.dir=DIR names one).
resume=DIR goes on with an interrupted run. -m runs all combinations of comma lists one after the other, --cfg job shows the
configuration that would run, with all keys. A folder conf/ here adds to the groups below and goes before them.""",
    "profile": """usage: bayesfed profile [key=value ...]

Takes the overrides of `bayesfed run`, and says at the end where the time went.""",
    "compare": """usage: bayesfed compare key=a,b ... [out=DIR] [jobs=N] [baseline=METHOD] [target=PERCENT] [budget=none] [tune=N] [tune_for=nll]

Runs all combinations of the comma lists (the overrides of `bayesfed run`) side by side, and writes a table, figures and report.html.
  out        folder; the same command again goes on with what is missing there
  jobs       runs at once; one a core if left out
  baseline   method that the others are tested against; the first if left out
  target     accuracy in percent: what it took to reach it
  budget     epochs (refuses methods with unequal rounds and epochs) or none
  tune       trials per method on a validation split before the comparison; tune_seed and tune_for=accuracy|nll steer them
More: docs/compare.md""",
    "partition": """usage: bayesfed partition [key=value ...] [out=DIR]

Splits the data as `bayesfed run` with the same overrides would, and writes clients.csv, partition.json and pictures.""",
    "status": """usage: bayesfed status RUN_DIR

Says how far a run is, how it does, and how to go on with it.""",
    "list": """usage: bayesfed list [FOLDER]

One line for each run below FOLDER (runs if left out).""",
}


def help_text(verb: str | None = None) -> str:
    """The help of ``verb``, or the overview."""
    if verb == "deploy":
        from bayesfed.deployment.command import USAGE as deployed

        return deployed
    if verb == "run":
        return f"{USAGE['run']}\n\nGroups, chosen by name (group=name):\n{_groups()}\n\nHydra's options: bayesfed --hydra-help"
    if verb is not None:
        return USAGE[verb]
    verbs = "\n".join(f"  {name:<11}{text}" for name, text in VERBS.items())
    return (
        f"usage: bayesfed [VERB] [key=value ...]\n\n{verbs}\n\n`bayesfed VERB --help` says more, `bayesfed run --help` lists the choices.\n"
        "Keys and values are Hydra's: bayesfed --cfg job shows them all, bayesfed --hydra-help explains Hydra's options.\n"
        "Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted (resumable)."
    )


def _groups() -> str:
    from bayesfed.composing import conf_dirs, options

    groups = sorted({path.name for folder in conf_dirs() for path in folder.iterdir() if path.is_dir()})
    return "\n".join(f"  {group}: {', '.join(options(group))}" for group in groups if options(group))
