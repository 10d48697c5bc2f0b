"""A command whose output can't be written does its work all the same."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bayesfed import cli
from bayesfed.output import Output
from bayesfed.runs.display import Display

QUICK = [
    "experiment=digits_het10",
    "model.hidden=[8]",
    "client.epochs=1",
    "eval.samples=2",
    "rounds=2",
    "figures=false",
]


class Broken(io.StringIO):
    """Takes some writes, then fails as an operating system does."""

    def __init__(self, error: Exception, after: int = 1):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


def bayesfed(args: list[str], folder: Path, prefix: str = "", suffix: str = "", **environment: str):
    """The command in a shell, with what the shell does to its output."""
    words = " ".join(
        [f"{prefix}'{sys.executable}' -c 'from bayesfed.cli import main; main()'", *(f"'{a}'" for a in args), suffix]
    )
    settings = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", **environment}
    command = ["bash", "-o", "pipefail", "-c", words]
    return subprocess.run(
        command, cwd=folder, env=os.environ | settings, capture_output=True, timeout=120, check=False
    )  # fmt: skip


ENDS = {
    "pipe": ("2>&1 | head -1", {}),
    "full disk": (">/dev/full 2>/dev/full", {}),
    "closed": ("<&- >&- 2>&-", {}),
    "ascii": ("", {"PYTHONIOENCODING": "ascii", "TERM": "dumb"}),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_ends_well_whatever_happens_to_its_output(tmp_path, name):
    suffix, environment = ENDS[name]
    done = bayesfed([*QUICK, "hydra.run.dir=run"], tmp_path, suffix=suffix, **environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 3
    assert b"Traceback" not in done.stdout + done.stderr
    assert b"Exception ignored" not in done.stdout + done.stderr
    if name == "ascii":
        assert done.stdout.isascii()
        assert b" - digits, 10 clients - " in done.stdout  # the title's dots


def test_a_comparison_ends_well_too(tmp_path):
    suffix, environment = ENDS["ascii"]
    args = ["compare", *QUICK[:-2], "rounds=1", "strategy=fedavg", "seed=1,2", "jobs=1", "out=c"]
    done = bayesfed(args, tmp_path, suffix=suffix, **environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (tmp_path / "c" / "report.html").is_file()
    assert "±" in (tmp_path / "c" / "table.md").read_text(encoding="utf-8")
    assert b"Traceback" not in done.stdout + done.stderr
    assert b" +- " in done.stdout


@pytest.mark.parametrize(
    ("args", "suffix", "code"),
    [("--help", "| head -0", 0), ("--version", ">/dev/full", 0), ("rounds=-1", ">&- 2>&-", 2)],
)
def test_what_only_prints_keeps_its_exit_code(tmp_path, args, suffix, code):
    done = bayesfed([args], tmp_path, suffix=suffix)
    assert done.returncode == code
    assert done.stderr == b""


def test_a_full_disk_below_the_run_directory_stays_an_error(tmp_path):
    """The output may go, the results may not."""
    limit = "ulimit -f 16; trap '' XFSZ; exec "  # files of at most 16 KiB: the posterior is larger
    done = bayesfed([*QUICK, "model.hidden=[128]", "hydra.run.dir=run"], tmp_path, prefix=limit, suffix="2>&1 | cat")
    assert done.returncode == 1, done.stdout
    assert b"File too large" in done.stdout
    assert b"Traceback" not in done.stdout


# -- the pieces --------------------------------------------------------------------------------------------------------

ERRORS = [OSError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "x"), OSError(errno.EIO, "x"), ValueError("closed file")]


@pytest.mark.parametrize("error", ERRORS)
def test_the_display_steps_aside_in_a_library_call_too(monkeypatch, error):
    stream = Broken(error)
    monkeypatch.setattr("sys.stdout", stream)
    with Display(rounds=3, start_round=0, clients=2, title="title") as shown:
        for round in range(4):
            shown.end_round({"round": round})
        shown.message("m")
    assert stream.getvalue() == "title\n"
    assert sys.stdout is stream


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("after", [0, 3])
def test_the_live_table_steps_aside(monkeypatch, error, after):
    stream = Broken(error, after)
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    with Display(rounds=3, start_round=0, clients=2, title="title") as shown:
        for round in range(4):
            shown.end_round({"round": round})
            shown.message("m")
            shown._live.refresh()
    assert sys.stdout is stream


def test_without_standard_output(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with Display(rounds=3, start_round=0, clients=2, title="title") as shown:
        shown.end_round({"round": 0})
    with pytest.raises(SystemExit, match="2"):
        cli.main(["rounds=-1"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a · b ± 1 … –", b"a - b +- 1 ... -"), ("Köln 中\udcff", b"K\\xf6ln \\u4e2d\\udcff"), ("plain", b"plain")],
)
def test_what_ascii_lacks_is_spelled(text, shown):
    raw = io.BytesIO()
    out = Output(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert out.write(text) == len(text)
    assert raw.getvalue() == shown
    assert not out.lost


def test_names_that_are_no_utf8_can_be_printed():
    """File names may hold any byte; Python keeps these as lone surrogates."""
    raw = io.BytesIO()
    out = Output(io.TextIOWrapper(raw, encoding="utf-8", write_through=True))
    out.write("runs/\udcff · x")
    assert raw.getvalue().decode() == "runs/\\udcff · x"


def test_the_command_leaves_the_streams_as_they_were(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out.startswith("bayesfed ")
