"""Configurations that earlier versions stored."""

import pytest
from omegaconf import OmegaConf

from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.runs.directory import RunDirectory


@pytest.fixture
def stored(tmp_path):
    """The run directory of today's default configuration with other ``keys``."""

    def write(**keys: object) -> RunDirectory:
        cfg = compose_config(["strategy=fedadmm", "rounds=1"])
        directory = RunDirectory(tmp_path)
        OmegaConf.set_struct(cfg, False)
        for key, value in keys.items():
            OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
        directory.write_config({k: v for k, v in cfg.items() if k not in ("hydra", "resume")}, "resume")
        return directory

    return write


def test_what_is_gone_is_left_out(stored):
    today = OmegaConf.to_container(stored().config())
    handlers = {"handler": "clients.handler.Trainer", "strategy__handler": "clients.fedadmm.FedADMMTrainer"}
    speed = {
        key: True for key in ("client__native", "client__compile") if key.partition("__")[2] not in today["client"]
    }
    earlier = stored(strategy__reference_quirks=False, **handlers, **speed)
    assert OmegaConf.to_container(earlier.config()) == today


def test_what_changed_the_results_ends_with_a_line(stored):
    with pytest.raises(
        InputError, match=r"strategy\.reference_quirks=True: the variants of published code .* are gone"
    ):
        stored(strategy__reference_quirks=True).config()
