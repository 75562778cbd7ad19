"""Plan ↔ JSON, documented and stable. Torch-free; what is read is checked before anything is believed.

    schema              2; another number is another format
    fits                true or false
    model               {name, quant, total_params (whole checkpoint, MTP included), active_params, weights_bytes,
                        download_bytes, disk_bytes}
    kv_bytes_per_token  of all layers, MTP not
    max_context         tokens; 0 where no context fits
    devices             [{name, kind "gpu"|"ram"|"nvme", capacity_bytes, used_bytes, lines [{what, bytes,
                        basis "exact"|"measured"|"modelled", note}]}]
    forecast            null, or {decode_tokens_per_s {context: value}, prefill_tokens_per_s, bound_by (of decode at
                        the shortest context), time_to_first_token_s {prompt tokens: seconds},
                        drafts_tokens_per_s {MTP drafts per step: value}, hit_rate or null, hit_rate_basis
                        ("measured": from a route trace of this model, "modelled": from a formula),
                        rates {the same four keys, each value as {value, low, high, basis, bound_by, note}}}
    shortfall           null, or {device, bytes, text}
    advice              [{text, option or null}], the smallest change first
    wants, resolved     what was asked for, and what every "auto" became
    placement           null, or per layer (MTP last): its device, its experts on each tier
    machine             what was planned for: gpus, cpu, ram, nvme, notes

Sizes are integers in bytes, rates tokens per second.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from glmlocal.errors import PlanError
from glmlocal.machine import kernel_rates
from glmlocal.machine.kernel_rates import KernelRates
from glmlocal.planner.machine import Cpu, ExpertGpu, Gpu, Machine, Nvme, Ram
from glmlocal.planner.plan import (
    CPU,
    Advice,
    Device,
    Forecast,
    Line,
    Placement,
    Plan,
    Rate,
    Resolved,
    Shortfall,
    Wants,
)

SCHEMA = 2
_MOST_BYTES = 4 << 20
_MOST_NUMBER = 1 << 60  # of bytes, tokens, parameters
_MOST_ITEMS = 4096
_MOST_TEXT = 4096
_MODEL = ("name", "quant", "total_params", "active_params", "weights_bytes", "download_bytes", "disk_bytes")
_RATES = ("decode_tokens_per_s", "prefill_tokens_per_s", "time_to_first_token_s", "drafts_tokens_per_s")
_AS_THEY_ARE = ("fits", "kv_bytes_per_token", "max_context", "advice", "wants", "resolved", "placement", "machine")


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fits": plan.fits,
        "model": {name: getattr(plan, name) for name in _MODEL},
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "max_context": plan.max_context,
        "devices": [_device(device) for device in plan.devices],
        "forecast": None if plan.forecast is None else _forecast(plan.forecast),
        "shortfall": None if plan.shortfall is None else _renamed(_plain(plan.shortfall), "nbytes", "bytes"),
        **{name: _plain(getattr(plan, name)) for name in _AS_THEY_ARE if name not in ("fits", "max_context")},
    }


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "kind": device.kind,
        "capacity_bytes": device.capacity_bytes,
        "used_bytes": device.used_bytes,
        "lines": [_renamed(_plain(line), "nbytes", "bytes") for line in device.lines],
    }


def _forecast(forecast: Forecast) -> dict[str, Any]:
    rates = {name: _plain(getattr(forecast, name)) for name in _RATES}
    shortest = min(forecast.decode_tokens_per_s)
    return {
        "decode_tokens_per_s": _values(rates["decode_tokens_per_s"]),
        "prefill_tokens_per_s": forecast.prefill_tokens_per_s.value,
        "bound_by": forecast.decode_tokens_per_s[shortest].bound_by,
        "time_to_first_token_s": _values(rates["time_to_first_token_s"]),
        "drafts_tokens_per_s": _values(rates["drafts_tokens_per_s"]),
        "hit_rate": forecast.hit_rate,
        "hit_rate_basis": forecast.hit_rate_basis,
        "rates": rates,
    }


def _values(rates: dict[str, Any]) -> dict[str, Any]:
    return {key: rate["value"] for key, rate in rates.items()}


def _renamed(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Dataclasses → dicts, tuples → lists, keys → text."""
    if isinstance(value, KernelRates):
        return kernel_rates.as_json(value)
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def load(path: Path) -> Plan:
    """Read what ``--save`` wrote. Raises PlanError for a file that is none, OSError for one that cannot be read."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise PlanError(f"{str(path)!r} is too large to be a plan; give a file that --save wrote")
    return from_json(data)


def from_json(text: str | bytes) -> Plan:
    """The inverse of ``json.dumps(as_json(plan))``. Raises PlanError for anything else, in one line."""
    again = "plan again with `glmlocal plan --save`"
    if len(text) > _MOST_BYTES:
        raise PlanError(f"this is too large to be a saved plan; {again}")
    try:
        values = json.loads(text)
        if values["schema"] != SCHEMA:
            raise PlanError(f"the plan has schema {str(values['schema'])[:40]!r}, this version reads {SCHEMA}; {again}")
        if values["forecast"] is not None:
            values["forecast"].setdefault("hit_rate_basis", "modelled")  # which older plans did not say
        plan = _plan(values)
        _check(plan)
        if as_json(plan) != values:
            raise ValueError("figures that do not agree with each other, or that are not a plan's")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise PlanError(f"the plan is damaged ({type(error).__name__}: {reason}); {again}") from None
    return plan


def _plan(values: Mapping[str, Any]) -> Plan:
    model, forecast, shortfall = values["model"], values["forecast"], values["shortfall"]
    return Plan(
        **{name: _read(_HINTS[Plan][name], model[name]) for name in _MODEL},
        **{name: _read(_HINTS[Plan][name], values[name]) for name in _AS_THEY_ARE},
        devices=tuple(_read_device(device) for device in _list(values["devices"])),
        forecast=None if forecast is None else _read_forecast(forecast),
        shortfall=None if shortfall is None else _read(Shortfall, _renamed(shortfall, "bytes", "nbytes")),
    )


def _read_device(values: Mapping[str, Any]) -> Device:
    lines = tuple(_read(Line, _renamed(line, "bytes", "nbytes")) for line in _list(values["lines"]))
    rest = {name: _read(_HINTS[Device][name], values[name]) for name in ("name", "kind", "capacity_bytes")}
    return Device(**rest, lines=lines)


def _read_forecast(values: Mapping[str, Any]) -> Forecast:
    rates = {name: _read(_HINTS[Forecast][name], values["rates"][name]) for name in _RATES}
    rest = {name: _read(_HINTS[Forecast][name], values[name]) for name in ("hit_rate", "hit_rate_basis")}
    return Forecast(**rates, **rest)


def _read(hint: Any, value: Any) -> Any:
    """``value`` as what the annotation says, its size and range checked. Raises ValueError, TypeError or KeyError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (wanted,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _read(wanted, value)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ValueError(f"{str(value)[:40]!r} is none of {', '.join(arguments)}")
        return value
    if origin is tuple:
        return tuple(_read(arguments[0], each) for each in _list(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict) or len(value) > _MOST_ITEMS:
            raise TypeError("an object of numbers was wanted")
        return {_integer(int(key)): _read(arguments[1], each) for key, each in value.items()}
    if hint is KernelRates:
        return kernel_rates.from_json(value)
    if is_dataclass(hint):
        return _read_fields(hint, value)
    return _SCALARS[hint](value)


def _read_fields(kind: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"a {kind.__name__} was wanted")
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not needed <= value.keys() <= {field.name for field in fields(kind)}:
        raise ValueError(f"a {kind.__name__} with other keys than it has")
    return kind(**{name: _read(_HINTS[kind][name], each) for name, each in value.items()})


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ITEMS:
        raise TypeError("a list was wanted, and a short one")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not CPU <= value <= _MOST_NUMBER:
        raise ValueError(f"{str(value)[:40]!r} is no number from {CPU} to 2^60")
    return value


def _real(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} is no number")
    if not math.isfinite(value) or not 0 <= value <= 1e30:
        raise ValueError(f"{str(value)[:40]!r} is no rate")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise TypeError("a text was wanted, and a short one")
    return value


_SCALARS = {int: _integer, float: _real, bool: _flag, str: _text}
_VALUES = (
    Plan,
    Device,
    Line,
    Forecast,
    Rate,
    Placement,
    Resolved,
    Shortfall,
    Advice,
    Wants,
    Machine,
    Gpu,
    ExpertGpu,
    Cpu,
    Ram,
    Nvme,
)
_HINTS = {kind: typing.get_type_hints(kind) for kind in _VALUES}


def _check(plan: Plan) -> None:
    """What the loader relies on. Raises ValueError."""
    place, resolved = plan.placement, plan.resolved
    if (
        plan.fits != (place is not None)
        or plan.fits != (plan.forecast is not None)
        or plan.fits != (not plan.shortfall)
    ):
        raise ValueError("it fits and does not")
    if plan.fits and any(device.used_bytes > device.capacity_bytes for device in plan.devices):
        raise ValueError("a device holds more than it can")
    sizes = (
        *(line.nbytes for device in plan.devices for line in device.lines),
        *(d.capacity_bytes for d in plan.devices),
    )
    if any(nbytes < 0 for nbytes in sizes):
        raise ValueError("a negative size")
    if not (resolved.context >= 1 and resolved.batch >= 1 and resolved.threads >= 1 and resolved.kv_tokens >= 1):
        raise ValueError("nothing to run")
    if resolved.num_drafts < 0 or resolved.max_num_batched_tokens < 1:
        raise ValueError("nothing to run")
    if place is not None:
        _check_placement(place, len(plan.machine.gpus))
        _check_slots(place, len(plan.machine.expert_gpus))


def _check_placement(place: Placement, num_gpus: int) -> None:
    counts = (place.gpu_experts, place.ram_experts, place.nvme_experts, place.ram_slots)
    if not place.layer_device or any(len(each) != len(place.layer_device) for each in counts):
        raise ValueError("a placement of unequal lengths, or of nothing")
    if any(number < 0 for each in counts for number in each):
        raise ValueError("a negative number of experts")
    if any(slots > homes for slots, homes in zip(place.ram_slots, place.nvme_experts, strict=True)):
        raise ValueError("more slots than experts")
    if any(device == CPU and here for device, here in zip(place.layer_device, place.gpu_experts, strict=True)):
        raise ValueError("experts on the GPU of a layer that has none")
    if any(not CPU <= device < num_gpus for device in (*place.layer_device, place.head_device)):
        raise ValueError("a layer on a device that there is not")


def _check_slots(place: Placement, num_gpus: int) -> None:
    if len(place.slot_device) != len(place.gpu_slots) or len(place.gpu_slots) not in (0, len(place.layer_device)):
        raise ValueError("slots on GPUs for other layers than there are")
    homes = [ram + nvme for ram, nvme in zip(place.ram_experts, place.nvme_experts, strict=True)]
    for device, slots, experts in zip(place.slot_device, place.gpu_slots, homes, strict=False):
        if not (CPU <= device < num_gpus and 0 <= slots <= experts) or (device == CPU and slots):
            raise ValueError("slots on a GPU that there is not, or more than experts")
