"""From comma lists to runs."""

from __future__ import annotations

import pytest

from bayesfed import cli
from bayesfed.compare.grid import baseline_of, check_budget, check_fit, grid
from bayesfed.compare.options import split_options
from bayesfed.errors import InputError


def runs_of(*args: str):
    return grid(split_options(args)[1])


def test_methods_seeds_and_settings_are_told_apart():
    runs = runs_of("strategy=fedavg,bayes_admm", "seed=3,1", "partition.alpha_classes=0.1,1", "rounds=4")
    assert {(r.setting, r.method, r.seed) for r in runs} == {
        (f"digits_het10 partition.alpha_classes={alpha}", method, seed)
        for alpha in ("0.1", "1")
        for method in ("fedavg", "bayes_admm")
        for seed in (1, 3)
    }
    assert all(r.cfg.seed == r.seed and r.cfg.rounds == 4 for r in runs)
    assert len({r.name for r in runs}) == len(runs) == 8


def test_a_family_is_named_only_where_there_are_several():
    several = runs_of("strategy=fedavg,bayes_admm", "strategy.family=isotropic,diagonal", "strategy.rho=0.3")
    assert [r.method for r in several] == ["fedavg", "bayes_admm/isotropic", "bayes_admm/diagonal"]
    assert [r.cfg.client.name for r in several] == ["adam", "adam", "ivon"]
    assert [r.cfg.strategy.get("rho") for r in several] == [None, 0.3, 0.3]
    assert [r.method for r in runs_of("strategy=bayes_admm", "strategy.family=isotropic")] == ["bayes_admm"]


def test_swept_values_of_a_method_are_part_of_its_name():
    runs = runs_of("strategy=fedavg,fedprox", "client=adam,sgd", "strategy.mu=0.1,1.0")
    assert [r.method for r in runs] == [
        "fedavg/adam",
        "fedavg/sgd",
        "fedprox/adam mu=0.1",
        "fedprox/adam mu=1.0",
        "fedprox/sgd mu=0.1",
        "fedprox/sgd mu=1.0",
    ]


def test_the_name_of_a_run_says_whether_its_result_can_differ():
    (plain,), (other,), (shown,) = runs_of(), runs_of("client.lr=0.5"), runs_of("figures=false", "logger=none")
    assert plain.name != other.name
    assert plain.name == shown.name


def test_unequal_budgets_are_refused():
    runs = runs_of("experiment=fmnist_het10_tuned", "strategy=fedavg,bayes_admm")
    assert runs[0].cfg.client.epochs == 10
    assert check_budget(runs) == []
    for run in runs[1:]:
        run.cfg.client.epochs = 5
    with pytest.raises(InputError, match=r"client.epochs=fedavg 10, bayes_admm 5: .*budget=none"):
        check_budget(runs)


def test_what_an_own_strategy_leaves_out_of_its_yaml_is_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "mine.yaml").write_text("_target_: strategies.FedAvg\nname: mine\n")
    runs = runs_of("strategy=fedavg,mine")
    assert check_budget(runs) == []
    runs[0].cfg.strategy.fraction = 0.5
    with pytest.raises(InputError, match=r"strategy.fraction=fedavg 0.5, mine 1.0: "):
        check_budget(runs)


def test_epochs_are_a_setting_and_samples_are_noted():
    runs = runs_of("strategy=fedavg,bayes_admm", "client.epochs=1,2", "client.mc_samples=3")
    assert {r.setting for r in runs} == {"digits_het10 client.epochs=1", "digits_het10 client.epochs=2"}
    assert "fedavg 1, bayes_admm 3" in check_budget(runs)[0]


def test_client_and_strategy_must_fit():
    with pytest.raises(InputError, match="client=ivon"):
        check_fit(runs_of("strategy=fedavg", "client=adam,ivon"))


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("strategy=fedavg,bayes_adm", "did you mean 'bayes_admm'"),
        ("strategy.rhoo=1", "did you mean 'rho'"),
        ("partition.alpha_clases=1,2", "did you mean 'alpha_classes'"),
        ("seed=1,x", "seed=x: must be a whole number"),
        ("rounds=2,-1", "rounds=-1"),
        ("jobs=0", "jobs=0"),
        ("jobs=1,2", "takes one value"),
        ("target=101", "target=101"),
        ("baseline=fedavgg", "did you mean 'fedavg'"),
        ("budget=time", "valid: epochs, none"),
        ("resume=x", "start the same command again"),
        ("hydra.run.dir=x", "runs go under out="),
        ("client.lr=interval(0.1,1)", "search with tune=N"),
        ("-m", "key=value only"),
        ("data=npz data.path=nowhere.npz", "data.path"),
        ("tune=2 tune_seed=1", "among the reported seeds"),
    ],
)
def test_bad_input_ends_before_anything_is_written(argument, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "strategy=fedavg,bayes_admm", "out=new", *argument.split(" ")])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not list((tmp_path).glob("new/*"))


def test_the_first_method_is_the_baseline():
    options, overrides = split_options(["strategy=fedprox,fedavg"])
    assert baseline_of(options, grid(overrides)) == "fedprox"
