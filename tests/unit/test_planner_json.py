"""Plans to JSON and back; files that somebody else wrote."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.errors import PlanError
from glmlocal.planner.machine import ExpertGpu, Nvme
from glmlocal.planner.plan import Wants
from glmlocal.planner.plan_json import as_json, from_json
from glmlocal.planner.solve import plan
from planned import H100, RTX4090, air, glm45, machine

INT4 = {"scheme": "int4 group 32", "bits": 4.5, "quant": "int4"}
PLANS = {
    "gpus": plan(air("fp8_channel", 8), machine(H100, H100), Wants()),
    "offload": plan(air(**INT4), machine(RTX4090, ram_gib=24, nvme=Nvme(2 * 10**12, 7.0, "/disk")), Wants(draft=1)),
    "ram": plan(air(**INT4), machine(ram_gib=96), Wants(context=4096, batch=2)),
    "experts": plan(
        air(**INT4),
        replace(machine(ram_gib=96), expert_gpus=(ExpertGpu(RTX4090, 20 << 30), ExpertGpu(RTX4090, 8 << 30))),
        Wants(),
    ),
    "refused": plan(glm45(), machine(*[H100] * 8), Wants()),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_written_is_read_back(name):
    assert from_json(json.dumps(as_json(PLANS[name]))) == PLANS[name]
    assert from_json(json.dumps(as_json(PLANS[name]), indent=2).encode()) == PLANS[name]


def test_the_documented_keys():
    values = json.loads(json.dumps(as_json(PLANS["gpus"])))
    assert values["fits"] is True
    assert {"total_params", "active_params", "weights_bytes"} <= values["model"].keys()
    assert values["model"]["total_params"] == PLANS["gpus"].total_params
    assert values["kv_bytes_per_token"] == 46 * 2048
    assert isinstance(values["max_context"], int)
    device = values["devices"][0]
    assert {"name", "kind", "capacity_bytes", "used_bytes", "lines"} <= device.keys()
    assert all({"what", "bytes", "basis"} <= line.keys() for line in device["lines"])
    assert sum(line["bytes"] for line in device["lines"]) == device["used_bytes"]
    forecast = values["forecast"]
    assert set(forecast["decode_tokens_per_s"]) == {"0", "8192", "32768", "131072"}
    assert forecast["decode_tokens_per_s"]["0"] == PLANS["gpus"].forecast.decode_tokens_per_s[0].value
    assert isinstance(forecast["prefill_tokens_per_s"], float)
    assert forecast["bound_by"] == "gpu memory"
    refused = as_json(PLANS["refused"])
    assert (refused["fits"], refused["forecast"], refused["placement"]) == (False, None, None)
    assert refused["shortfall"]["bytes"] > 0
    assert refused["advice"][0]["option"].startswith("--cpu-offload-gb")


def changed(name: str, path: str, value: object) -> str:
    """The plan's JSON with one thing replaced."""
    values = copy.deepcopy(json.loads(json.dumps(as_json(PLANS[name]))))
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 1),
        ("schema", None),
        ("fits", "yes"),
        ("fits", False),
        ("model", None),
        ("model.total_params", -5),
        ("model.total_params", 1.5),
        ("model.weights_bytes", 10**30),
        ("model.name", "x" * 10_000),
        ("kv_bytes_per_token", True),
        ("devices", {}),
        ("devices.0.kind", "tape"),
        ("devices.0.used_bytes", 0),
        ("devices.0.capacity_bytes", 5),
        ("devices.0.lines.0.bytes", -1),
        ("devices.0.lines.0.bytes", 10**13),
        ("devices.0.lines.0.basis", "guessed"),
        ("forecast", None),
        ("forecast.bound_by", "luck"),
        ("forecast.prefill_tokens_per_s", 1e9),
        ("forecast.rates.prefill_tokens_per_s.value", -1.0),
        ("forecast.rates.prefill_tokens_per_s.low", float("nan")),
        ("forecast.rates.decode_tokens_per_s", {"zero": 1}),
        ("forecast.rates.decode_tokens_per_s", {}),
        ("forecast.rates.decode_tokens_per_s.0", 7),
        ("shortfall", {"device": "RAM", "bytes": 1, "text": ""}),
        ("advice", ["buy a GPU"]),
        ("wants.batch", "8"),
        ("wants", {}),
        ("resolved.batch", 0),
        ("resolved.context", -1),
        ("resolved.threads", 0),
        ("resolved.more", 1),
        ("placement", None),
        ("placement.layer_device", []),
        ("placement.layer_device", [0]),
        ("placement.layer_device.3", 7),
        ("placement.layer_device.3", -1),
        ("placement.gpu_experts.3", -1),
        ("placement.ram_slots.3", 128),
        ("placement.head_device", 64),
        ("machine.gpus", [1]),
        ("machine.cpu.threads", 1.5),
        ("machine.notes", "a note"),
    ],
)
def test_damage_is_one_line(path, value):
    with pytest.raises(PlanError) as error:
        from_json(changed("gpus", path, value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"schema": 1}',
        "[" * 100_000,
        b"\xff\xfe",
        '{"schema": 1' + "0" * 5000 + "}",
        "9" * 5000,
    ],
)
def test_other_files_are_refused(text):
    with pytest.raises(PlanError):
        from_json(text)


def test_a_file_beyond_reason_is_not_parsed():
    with pytest.raises(PlanError, match="too large"):
        from_json(b" " * (5 << 20))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def leaves(values: object, path: tuple[object, ...] = ()):
    """Paths to everything in a JSON value."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


SMALL = json.loads(json.dumps(as_json(plan(air(layers=3, **INT4), machine(RTX4090), Wants(context=64)))))
PATHS = list(leaves(SMALL))


@given(st.sampled_from(PATHS), JUNK)
def test_anything_in_any_place_is_a_plan_or_a_plan_error(path, junk):
    values = copy.deepcopy(SMALL)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = junk
    try:
        read = from_json(json.dumps(values))
    except PlanError:
        return
    assert as_json(read) == values


def test_numbers_are_exact():
    found = PLANS["ram"]
    odd = replace(found, forecast=replace(found.forecast, hit_rate=0.1 + 0.2), download_bytes=2**59 + 1)
    assert from_json(json.dumps(as_json(odd))) == odd


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("placement.gpu_slots.3", 129),
        ("placement.gpu_slots.3", -1),
        ("placement.gpu_slots", []),
        ("placement.slot_device.3", 2),
        ("placement.slot_device.3", -1),
        ("placement.slot_device", [0]),
        ("machine.expert_gpus", []),
        ("machine.expert_gpus.0.free_bytes", -5),
    ],
)
def test_slots_on_gpus_that_cannot_be_are_refused(path, value):
    with pytest.raises(PlanError, match="plan again"):
        from_json(changed("experts", path, value))
