"""Fleet files are read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.up.fleet import FLEETS, load_fleet
from cloud.up.laptop import CloudModel, place
from wire.errors import InvalidInputError, NotFoundError


@pytest.mark.parametrize("name", sorted(path.stem for path in FLEETS.glob("*.yaml")))
def test_every_shipped_fleet_loads_and_names_known_profiles(name: str) -> None:
    fleet = load_fleet(name)
    profiles = {path.stem for path in (FLEETS.parent / "devices").glob("*.yaml")}
    assert {device.profile for device in fleet.devices} <= profiles


def test_an_unknown_fleet_names_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="laptop"):
        load_fleet("mainframe")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("name: twins\ndevices: [{device_id: a, profile: cpu-small}, {device_id: a, profile: cpu-small}]\n")
    with pytest.raises(InvalidInputError, match="named twice"):
        load_fleet(str(file))


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("name: odd\nsharks: 3\n")
    with pytest.raises(InvalidInputError, match="sharks"):
        load_fleet(str(file))


def test_each_further_cloud_model_gets_a_worker_of_its_own() -> None:
    models = [CloudModel("small", Path("a")), CloudModel("qwen2.5-coder-0.5b", Path("b"))]
    placed = [(worker.role, model.name) for worker, model in place(load_fleet("laptop"), models)]
    assert placed == [("prefill", "small"), ("decode", "small"), ("both", "qwen2.5-coder-0.5b")]
    alone = place(load_fleet("laptop").model_copy(update={"workers": []}), models[1:])
    assert [(worker.role, model.name) for worker, model in alone] == [("both", "qwen2.5-coder-0.5b")]
