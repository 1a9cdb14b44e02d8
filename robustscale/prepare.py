"""Write a data set in the form that training reads: a .beton file (FFCV's format) and its sidecar.

    python -m robustscale.prepare digits digits/train.beton
    python -m robustscale.prepare digits digits/test.beton --split test
    python -m robustscale.prepare cifar10 cifar/train.beton
    python -m robustscale.prepare folder:~/imagenet imagenet/train.beton --resolution 256 --workers 8
    python -m robustscale.prepare parquet:cats-and-dogs pets/train.beton --skip-bad

SOURCE is KIND or KIND:PATH; a PATH alone will do where its content shows the kind. A folder that holds train.beton and
test.beton can be trained on: `python -m robustscale.pretrain --data.source FOLDER`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_loaders.beton import sidecar_path
from data_loaders.plan import Format
from data_loaders.sources import kinds, open_source
from data_loaders.write import write
from robustscale.cli import door
from robustscale.config import unknown
from robustscale.errors import InputError
from robustscale.untrusted import expanded


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    out: Path = expanded(options.out)
    if out.exists() and not options.overwrite:
        raise InputError(f"{out}: exists already; give another name, or --overwrite to replace it")
    source = open_source(options.source, options.split, root=options.root, download=options.download)
    began = time.monotonic()
    with _progress(out.name) as progress:
        sidecar = write(
            source,
            out,
            resolution=options.resolution,
            format=options.format,
            quality=options.quality,
            skip_bad=options.skip_bad,
            progress=progress,
            workers=options.workers,
        )
    print(_summary(out, sidecar, time.monotonic() - began))
    return 0


def _summary(out: Path, sidecar: dict[str, Any], seconds: float) -> str:
    classes = ", ".join(sidecar["classes"][:5]) + (", ..." if len(sidecar["classes"]) > 5 else "")
    one_size = sidecar["height"] and sidecar["width"]
    size = f"{sidecar['height']} x {sidecar['width']}" if one_size else "different sizes"
    images = f"{sidecar['num_examples']:,} of {size}, {sidecar['channels']} channel(s)"
    lines = [
        f"{out}: split {sidecar['split']} of {sidecar['source']}",
        f"  images       {images}, stored as {sidecar['format']}",
        f"  classes      {len(sidecar['classes'])} ({classes})",
        f"  size         {sidecar['size'] / 1e6:,.1f} MB, written in {seconds:.1f} s",
        f"  fingerprint  {sidecar['fingerprint']}",
        f"  sidecar      {sidecar_path(out).name}: keep it beside the file",
    ]
    if sidecar["skipped"]:
        lines.insert(2, f"  left out     {sidecar['skipped']:,} that could not be read")
    return "\n".join(lines)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; in a log, a line each tenth."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    tenths = 0

    def line(done: int, total: int) -> None:
        nonlocal tenths
        if done * 10 // total != tenths:
            tenths = done * 10 // total
            print(f"{name}: {done:,} of {total:,} images", file=sys.stderr, flush=True)

    yield line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        strange = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if strange is not None:
            raise unknown("option", strange[1], [o for o in self._option_string_actions if o.startswith("--")])
        raise InputError(f"{message}; see python -m robustscale.prepare --help")


def _parser() -> argparse.ArgumentParser:
    modules = dict.fromkeys(kinds().values())
    sources = "\n".join(f"  {', '.join(module.KINDS)}\n      {_first_line(module.open_source)}" for module in modules)
    parser = _Parser(
        prog="python -m robustscale.prepare",
        description=__doc__,
        epilog=f"sources:\n{sources}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="where the images come from; see below")
    add("out", metavar="OUT.beton", type=Path, help="file to write; OUT.beton.json is written beside it")
    add("--split", help="train, test, ...; by default the source's only one, else train")
    add("--resolution", type=int, help="reduce images to a shorter side of so many pixels; by default as they are")
    formats = "array: pixels of one size; jpg, raw: any sizes; mixed: half each; auto: array if all are small and equal"
    add("--format", choices=get_args(Format), default="auto", help=formats)
    add("--quality", type=int, default=90, help="of JPEG, 1..100 (default: 90)")
    add("--root", type=Path, help="where downloads are kept (default: ~/.cache/robustscale/downloads)")
    add("--no-download", dest="download", action="store_false", help="use only what is in --root already")
    add("--skip-bad", action="store_true", help="leave out images that can't be read, and name them")
    add("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    workers = min(8, len(os.sched_getaffinity(0)))
    add("--workers", type=int, default=workers, help=f"threads that read and encode (default here: {workers})")
    return parser


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    door(main)
