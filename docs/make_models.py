"""Write the tables of docs/models.md, between its markers, from the catalogue.

python docs/make_models.py          # rewrites the page; a test checks that it is current
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from glmlocal import catalogue
from glmlocal.catalogue import Family, Release
from glmlocal.models.footprint import Footprint
from glmlocal.models.footprints import of_release
from glmlocal.units import GIB

PAGE = Path(__file__).with_name("models.md")
MARKERS = ("<!-- tables -->", "<!-- end of tables -->")
_STORED = {
    "bf16": "BF16",
    "fp8_channel": "FP8, a scale per row",
    "fp8_block128": "FP8, a scale per 128 × 128",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
    "mlx": "MLX",
    "gguf": "GGUF",
}


def tables() -> str:
    """Markdown: the families, then the releases of each."""
    return "\n".join([f"As of {catalogue.as_of()}.", "", *_families(), *_releases()])


def page(text: str) -> str:
    """The page with its tables made anew."""
    start, end = MARKERS
    before, rest = text.split(start)
    return f"{before}{start}\n{tables()}\n{end}{rest.split(end)[1]}"


def _families() -> Iterator[str]:
    yield "| family | parameters, with MTP | active per token | layers + MTP | experts | context | KV per token, bf16 |"
    yield "| --- | ---: | ---: | --- | --- | ---: | ---: |"
    for family in catalogue.families():
        footprint, config = _original(family), family.config
        yield (
            f"| {family.name} | {footprint.total_params / 1e9:.1f}B | {footprint.active_params / 1e9:.1f}B "
            f"| {config['num_hidden_layers']} + {config['num_nextn_predict_layers']} "
            f"| {config['n_routed_experts']}, {config['num_experts_per_tok']} per token, "
            f"{config['n_shared_experts']} shared | {config['max_position_embeddings']:,} "
            f"| {footprint.kv_bytes_per_token('bf16') / 1024:.0f} KiB |"
        )


def _original(family: Family) -> Footprint:
    return of_release(next(release for release in catalogue.releases() if release.family is family))


def _releases() -> Iterator[str]:
    for family in catalogue.families():
        yield from ("", f"## {family.name}", "")
        yield "| release | stored as | Hugging Face | ModelScope | download | in memory | MTP | runs |"
        yield "| --- | --- | --- | --- | ---: | ---: | --- | --- |"
        yield from (_row(release) for release in catalogue.releases() if release.family is family)


def _row(release: Release) -> str:
    footprint = of_release(release)
    about = "" if footprint.is_exact else "~"
    mtp = {"with copies": "yes, with copies", "without copies": "yes", "none": "no"}[release.mtp]
    return (
        f"| `{release.name}` | {_STORED[release.format]} | {release.huggingface or '?'} | {release.modelscope or '?'} "
        f"| {about}{footprint.file_bytes / 1e9:.1f} GB | {about}{footprint.nbytes / GIB:.1f} GiB | {mtp} "
        f"| {'yes' if release.runs else 'no'} |"
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
