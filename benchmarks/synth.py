"""Write a random model with the true per-layer shape of a GLM-4.5 family member, cut to a few layers.

    python benchmarks/synth.py --model GLM-4.5-Air --layers 5 --format gguf-q4_0 --out DIR

For benchmarks and tests that need the real shapes but not the real weights: activations stay sane, the tokenizer and
chat template are valid, routing has a chosen skew and the MTP layer a chosen acceptance (how: ``synthetic/model.py``).
The same arguments give the same bytes; another format gives other weights. Random codes are written as they are, never
quantized, a chunk at a time: a few hundred MB of memory whatever the model. Needs numpy, gguf and rich.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from synthetic import gguf_file, safetensors_dir
from synthetic.model import SHAPES
from synthetic.pieces import Spec
from synthetic.text import MIN_VOCAB_SIZE, build_vocabulary

from glmlocal.errors import ConfigError, GlmlocalError
from glmlocal.units import format_bytes

FORMATS = (*gguf_file.LINEAR, *safetensors_dir.LINEAR)
DISK_MARGIN_BYTES = 256 << 20


def make_spec(
    model: str,
    file_format: str,
    *,
    layers: int | None = None,
    vocab: int | None = None,
    seed: int = 0,
    skew: float = 0.5,
    mtp_acceptance: float | None = None,
) -> Spec:
    """Check the wishes. Raises ConfigError."""
    shape = SHAPES[model]
    layers = shape.num_hidden_layers if layers is None else layers
    vocab = shape.vocab_size if vocab is None else vocab
    least = shape.first_k_dense_replace + 1
    if not least <= layers <= shape.num_hidden_layers:
        raise ConfigError(
            f"--layers is {layers}, wanted {least} (the first with experts) to {shape.num_hidden_layers} for {model}"
        )
    if not MIN_VOCAB_SIZE <= vocab <= 500_000 or vocab % 32:
        raise ConfigError(f"--vocab is {vocab}, wanted a multiple of 32 from {MIN_VOCAB_SIZE} to 500000")
    if not 0 <= skew <= 3:
        raise ConfigError(f"--skew is {skew:g}, wanted 0 (all experts alike) to 3")
    if mtp_acceptance is not None and not 0 <= mtp_acceptance <= 1:
        raise ConfigError(f"--mtp-acceptance is {mtp_acceptance:g}, wanted 0 to 1")
    if seed < 0:
        raise ConfigError(f"--seed is {seed}, wanted 0 or more")
    shape = replace(shape, num_hidden_layers=layers, vocab_size=vocab)
    return Spec(shape, build_vocabulary(vocab), file_format, seed, skew, mtp_acceptance)


def write(spec: Spec, out: Path, *, progress: bool = False) -> Path:
    """Write the model into directory ``out``, or as the file ``out`` when that ends in .gguf; returns its path.

    Nothing half-written is left behind. Raises ConfigError when something is there already or the disk is too small.
    """
    is_gguf = spec.format in gguf_file.LINEAR
    target = out / f"{spec.title}.gguf" if is_gguf and out.suffix != ".gguf" else out
    if not is_gguf and target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; delete it or choose another --out")
    if is_gguf and target.exists():
        raise ConfigError(f"{target} exists already; delete it or choose another --out")
    layout = gguf_file if is_gguf else safetensors_dir
    pieces = layout.pieces(spec)
    nbytes = sum(piece.nbytes for piece in pieces)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + DISK_MARGIN_BYTES:
        raise ConfigError(
            f"{spec.title} takes {format_bytes(nbytes)}, but {target.parent} has {format_bytes(free)} free; "
            "ask for fewer --layers or choose another --out"
        )
    partial = target.with_name(f"{target.name}.part")
    try:
        with _bar(spec.title, nbytes, enabled=progress) as on_bytes:
            if not is_gguf:
                partial.mkdir()
            layout.write(spec, pieces, partial, on_bytes)
        partial.replace(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    return target


@contextmanager
def _bar(title: str, nbytes: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    if not enabled:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=nbytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=list(SHAPES), default="GLM-4.5-Air")
    parser.add_argument("--layers", type=int, help="without the MTP layer; default: all")
    parser.add_argument("--format", choices=FORMATS, default="gguf-q4_0")
    parser.add_argument("--out", type=Path, required=True, help="a directory, or for GGUF a file name ending in .gguf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.5, help="popularity of expert n is n**-SKEW; default 0.5")
    parser.add_argument("--mtp-acceptance", type=float, help="add an MTP layer that is right this often (0 to 1)")
    parser.add_argument("--vocab", type=int, help="cut the vocabulary; default: the model's")
    args = parser.parse_args(argv)
    try:
        spec = make_spec(
            args.model,
            args.format,
            layers=args.layers,
            vocab=args.vocab,
            seed=args.seed,
            skew=args.skew,
            mtp_acceptance=args.mtp_acceptance,
        )
        path = write(spec, args.out, progress=sys.stderr.isatty())
    except (GlmlocalError, OSError) as error:
        print(f"synth.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
