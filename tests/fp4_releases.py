"""Matrices of 4-bit floats as NVFP4 and MXFP4 releases of several tools store them, packed by plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]
_MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class Fp4Codes:
    """A matrix [out, in]: codes are a sign bit and the number of a magnitude."""

    codes: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # bytes [out, groups]
    factor: torch.Tensor | None  # [1], of NVFP4
    wide: torch.Tensor  # [out, in]

    @property
    def bytes(self) -> torch.Tensor:
        """Two codes each, the first one lower."""
        return self.codes[:, ::2] | self.codes[:, 1::2] << 4


def _coded(weight: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    spread = scales.repeat_interleave(group, 1)
    steps = weight / spread
    codes = (steps.abs()[..., None] - _MAGNITUDES).abs().argmin(-1)
    wide = _MAGNITUDES[codes] * torch.where(steps < 0, -1.0, 1.0) * spread
    return (codes | (steps < 0).long() << 3).to(torch.uint8), wide


def nvfp4(weight: torch.Tensor, *, divided: bool, has_factor: bool = True) -> Fp4Codes:
    largest = weight.float().unflatten(1, (-1, 16)).abs().amax(2)
    factor = torch.tensor([448 * 6 / float(largest.max())]) if has_factor else torch.ones(1)
    if not divided:
        factor = 1 / factor
    stored = (largest / 6 * factor if divided else largest / 6 / factor).to(torch.float8_e4m3fn)
    scales = stored.float() / factor if divided else stored.float() * factor
    codes, wide = _coded(weight.float(), scales.clamp(min=1e-30), 16)
    return Fp4Codes(codes, stored, factor if has_factor else None, wide)


def mxfp4(weight: torch.Tensor) -> Fp4Codes:
    exponents = (weight.float().unflatten(1, (-1, 32)).abs().amax(2) / 6).log2().ceil()
    codes, wide = _coded(weight.float(), exponents.exp2(), 32)
    return Fp4Codes(codes, (exponents + 127).to(torch.uint8), None, wide)


def compressed(name: str, made: Fp4Codes) -> Tensors:
    tensors = {f"{name}.weight_packed": made.bytes, f"{name}.weight_scale": made.scales}
    if made.factor is not None:
        tensors |= {f"{name}.weight_global_scale": made.factor, f"{name}.input_global_scale": torch.tensor([3.0])}
    return tensors


def modelopt(name: str, made: Fp4Codes) -> Tensors:
    tensors = {f"{name}.weight": made.bytes, f"{name}.weight_scale": made.scales}
    if made.factor is not None:
        tensors |= {f"{name}.weight_scale_2": made.factor.reshape(()), f"{name}.input_scale": torch.tensor(0.1)}
    return tensors


def mlx(name: str, made: Fp4Codes) -> Tensors:
    words = made.bytes.contiguous().view(torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": made.scales.view(torch.uint8)}
