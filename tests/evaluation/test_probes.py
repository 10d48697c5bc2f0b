"""What every probe is, and a user's own."""

from __future__ import annotations

from dataclasses import fields

import pytest
from omegaconf import OmegaConf

import bayesfed
from bayesfed.composing import ROOT, conf_dir
from bayesfed.errors import InputError, RunFailed
from bayesfed.evaluation.probes import OTHERS, built_in, make_probes

OWN = """
from dataclasses import dataclass
from bayesfed.errors import number
from bayesfed.evaluation.probes import Probe

@dataclass(kw_only=True)
class Norm(Probe):
    norm_scale: float = 1.0

    def __post_init__(self):
        number("norm_scale", self.norm_scale, above=0)

    def after_round(self, round, posterior):
        return {"norm": self.norm_scale * float(posterior.mean.norm())}

@dataclass(kw_only=True)
class Taken(Norm):
    def after_round(self, round, posterior):
        return {"mean/nll": 0.0}

@dataclass(kw_only=True)
class Broken(Norm):
    when: str = "begin"

    def begin(self, subject):
        assert self.when != "begin", "no luck"

    def after_round(self, round, posterior):
        assert self.when != "after_round", "no luck"
        return {}

    def in_summary(self, records):
        assert self.when != "in_summary", "no luck"
        return {}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_probe.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "own_probe.Norm"


def test_the_keys_in_the_yaml_file_are_those_of_the_probes_with_their_defaults():
    section = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{ROOT}.yaml").eval)
    assert {f.name for kind in built_in() for f in fields(kind) if f.init} | set(OTHERS) == section.keys()
    for probe in make_probes({}):
        keys = [f.name for f in fields(probe) if f.init]
        assert {key: section[key] for key in keys} == {key: getattr(probe, key) for key in keys}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"evry": 2}, "eval.evry=2: no such key; did you mean 'every'"),
        ({"every": 0}, "eval.every=0"),
        ({"bayes_every": "often"}, "eval.bayes_every=often: must be a whole number"),
        ({"at_once": 0}, "eval.at_once=0"),
        ({"target_accuracy": [50, 101]}, "eval.target_accuracy=101"),
        ({"ood": "nois"}, "eval.ood=nois: did you mean 'noise'"),
        ({"clients_every": -1}, "eval.clients_every=-1"),
        ({"personalized": 3}, "eval.personalized=3: must be true or false"),
        ({"probes": ["no.Such"]}, "eval.probes=no.Such: cannot be imported"),
        ({"probes": ["bayesfed.problem.Gaussian"]}, "eval.probes=bayesfed.problem.Gaussian: must be a subclass of"),
    ],
)
def test_refusals(section, message):
    with pytest.raises(InputError) as refusal:
        make_probes(section)
    assert message in str(refusal.value)


def test_a_users_own_probe_is_one_file(own, tmp_path):
    quick = ["experiment=linreg", "rounds=1", "eval.samples=1", "display=false", "figures=false"]
    options = [*quick, f"eval.probes=[{own}]"]
    result = bayesfed.run([*options, "+eval.norm_scale=3", f"hydra.run.dir={tmp_path}/r"])
    norm = float(result.posterior.mean.norm())
    assert [record["norm"] for record in result.rounds] == pytest.approx([0.0, 3 * norm])
    assert result.summary["norm"] == pytest.approx(3 * norm)
    with pytest.raises(InputError, match=r"eval\.norm_scale=0: must be"):
        bayesfed.run([*options, "+eval.norm_scale=0", f"hydra.run.dir={tmp_path}/s"])
    with pytest.raises(RunFailed, match="another probe has a metric 'mean/nll'"):
        bayesfed.run([*quick, "eval.probes=[own_probe.Taken]", f"hydra.run.dir={tmp_path}/t"])


@pytest.mark.parametrize(
    ("when", "error", "message"),
    [
        ("begin", InputError, r"begin fails: AssertionError: no luck \(own_probe.py, line \d+\)"),
        ("after_round", RunFailed, r"round 0: Broken.after_round fails: AssertionError: no luck"),
        ("in_summary", RunFailed, r"summary.json: Broken.in_summary fails: AssertionError: no luck"),
    ],
)
def test_a_users_own_probe_that_raises_ends_the_run_in_one_line(own, when, error, message):
    quick = ["experiment=linreg", "rounds=1", "eval.samples=1", "display=false", "figures=false"]
    with pytest.raises(error, match=message):
        bayesfed.run([*quick, "eval.probes=[own_probe.Broken]", f"+eval.when={when}"])


def test_a_key_of_an_own_probe_without_plus_is_told_so(own):
    with pytest.raises(InputError, match=r"eval\.own=1: no such key; .*goes with \+eval\.own=1"):
        bayesfed.run([f"eval.probes=[{own}]", "eval.own=1"])
