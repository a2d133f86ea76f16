"""Heat and power, read from real folder trees as kernels lay them out, and what they do to the choice of a place."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.climate import Climate, ClimateWatch, read_climate
from edge_agent.offload import Request, Situation, choose

ORIN: Mapping[str, str] = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "61500",
    "class/thermal/thermal_zone0/trip_point_0_type": "active",
    "class/thermal/thermal_zone0/trip_point_0_temp": "51000",
    "class/thermal/thermal_zone0/trip_point_1_type": "passive",
    "class/thermal/thermal_zone0/trip_point_1_temp": "99000",
    "class/thermal/thermal_zone0/trip_point_2_type": "critical",
    "class/thermal/thermal_zone0/trip_point_2_temp": "104500",
    "class/thermal/thermal_zone1/type": "gpu-thermal",
    "class/thermal/thermal_zone1/temp": "94000",
    "class/thermal/thermal_zone1/trip_point_0_type": "passive",
    "class/thermal/thermal_zone1/trip_point_0_temp": "99000",
    "class/thermal/thermal_zone2/type": "cv0-thermal",
    "class/thermal/thermal_zone2/temp": "-256000",
    "class/thermal/cooling_device0/type": "pwm-fan",
    "class/thermal/cooling_device0/cur_state": "3",
    "class/thermal/cooling_device1/type": "cpufreq-cpu0",
    "class/thermal/cooling_device1/cur_state": "0",
    "class/hwmon/hwmon1/name": "ina3221",
    "class/hwmon/hwmon1/in1_label": "VDD_IN",
    "class/hwmon/hwmon1/in1_input": "5000",
    "class/hwmon/hwmon1/curr1_input": "2400",
    "class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "class/hwmon/hwmon1/in2_input": "5000",
    "class/hwmon/hwmon1/curr2_input": "1200",
}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def test_a_jetson_s_zones_and_rails_are_read(tmp_path: Path) -> None:
    climate = read_climate(tree(tmp_path, ORIN))
    assert climate.headroom_c == 5.0
    assert climate.hottest_c == 94.0
    assert climate.power_w == 12.0
    assert not climate.is_throttled


def test_a_processor_that_is_cooled_is_throttled_a_fan_that_turns_is_not(tmp_path: Path) -> None:
    slowed = {**ORIN, "class/thermal/cooling_device1/cur_state": "2"}
    assert read_climate(tree(tmp_path, slowed)).is_throttled


def test_a_laptop_on_battery_and_a_gpu_are_read(tmp_path: Path) -> None:
    files = {
        "class/power_supply/AC/type": "Mains",
        "class/power_supply/BAT0/type": "Battery",
        "class/power_supply/BAT0/status": "Discharging",
        "class/power_supply/BAT0/capacity": "15",
    }
    climate = read_climate(tree(tmp_path, files), lambda: "71, 240.5, Not Active, Active")
    assert climate == Climate(None, 71.0, 240.5, is_throttled=True, on_battery=True, battery_share=0.15)


def test_a_system_that_tells_nothing_or_nonsense_is_no_trouble(tmp_path: Path) -> None:
    assert read_climate(tmp_path / "absent") == Climate()
    broken = {"class/thermal/thermal_zone0/temp": "hot", "class/hwmon/hwmon0/power1_input": ""}
    assert read_climate(tree(tmp_path, broken), lambda: "N/A") == Climate()


def test_a_reading_is_kept_until_it_is_old() -> None:
    now, readings = [0.0], [Climate(hottest_c=40.0), Climate(hottest_c=50.0)]
    watch = ClimateWatch(lambda: readings.pop(0), lambda: now[0])
    assert watch.is_old
    assert watch.renew().hottest_c == 40.0
    now[0] = 1.0
    assert not watch.is_old
    now[0] = 5.0
    assert watch.is_old
    assert watch.renew().hottest_c == 50.0


def _place(**situation: object) -> tuple[str | None, str]:
    known = Situation(model_is_here=True, context_tokens=512, has_gateway=True, cloud_is_reachable=True)
    both = Situation(**{**known.__dict__, **situation})  # type: ignore[arg-type]
    decision = choose(Request("chat", 10, 32), both, decision_id="d", now=NOW)
    return decision.chosen, decision.reason


def test_a_hot_device_sends_its_requests_to_the_cloud_and_says_so() -> None:
    assert _place(headroom_c=30.0)[0] == "device"
    chosen, reason = _place(is_throttled=True)
    assert (chosen, "slowed down for heat" in reason) == ("cloud", True)
    chosen, reason = _place(headroom_c=1.0)
    assert (chosen, "1 degrees from slowing down" in reason) == ("cloud", True)


def test_a_power_budget_and_a_low_battery_count() -> None:
    assert _place(power_w=20.0)[0] == "device"
    chosen, reason = _place(power_w=20.0, power_budget_w=15.0)
    assert (chosen, "drawing 20 of 15 W" in reason) == ("cloud", True)
    assert _place(on_battery=True, battery_share=0.1)[0] == "cloud"
    assert _place(on_battery=True, battery_share=0.9)[0] == "device"


def test_heat_never_keeps_an_answer_from_where_it_is_the_only_place() -> None:
    assert _place(is_throttled=True, cloud_is_reachable=False)[0] == "device"
