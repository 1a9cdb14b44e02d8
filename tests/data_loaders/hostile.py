"""Files that somebody spoilt: mutants of sound .beton files, and a process in which FFCV really reads them.

A *damaged* mutant keeps the sidecar of the file that it was made from; a *forged* one is given a sidecar that agrees
with it, so that nothing but the proof of its structure stands between it and FFCV.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders import layout, torch_loader
from data_loaders.augment import Request
from data_loaders.beton import Beton, sidecar_path
from robustscale.errors import InputError

PATIENCE = 60.0
"""Seconds after which FFCV is taken for hung."""
START = 300.0
"""Seconds for a process to import it, and for Numba to compile the first file's pipeline."""
INTERESTING = [0, 1, 2, 3, 7, 8, 255, 256, 2**15, 2**16 - 1, 2**21, 2**23, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62]
INTERESTING += [2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]


class Spoilt:
    """A file that is changed in place, and made good again."""

    def __init__(self, original: Beton, path: Path) -> None:
        self.path, self.original = path, original
        self.content = np.frombuffer(original.path.read_bytes(), np.uint8)
        self.sidecar = sidecar_path(original.path).read_bytes()
        self.row = layout.ARRAY_ROW if original.is_array else layout.IMAGE_ROW
        self.num_rows, self.size = original.num_examples, len(self.content)
        self.table = int(self.content[: layout.HEADER.itemsize].view(layout.HEADER)["table"][0])
        self.restore()

    def restore(self) -> None:
        self.bytes = self.content.copy()
        self.json = self.sidecar

    def write(self, *, forged: bool) -> None:
        """Forged where a sidecar can be made at all, which needs sound tables."""
        self.path.write_bytes(self.bytes.tobytes())
        sidecar_path(self.path).write_bytes(self.json)
        if forged:
            about = {key: json.loads(self.sidecar)[key] for key in ("source", "split", "classes", "format")}
            with contextlib.suppress(InputError):
                sidecar_path(self.path).write_text(json.dumps(Beton(self.path, about=about).sidecar))


Mutation = Callable[[Spoilt, np.random.Generator], None]


def a_field(spoilt: Spoilt, random: np.random.Generator) -> None:
    """A number of the tables becomes another."""
    kind, at = _some_entry(spoilt, random)
    assert kind.fields is not None
    name = str(random.choice(list(kind.fields)))
    dtype, offset = kind.fields[name][:2]
    numbers = dtype.subdtype[0] if dtype.subdtype else dtype
    if numbers.kind == "S":
        spoilt.bytes[at + offset + random.integers(0, 12)] = random.integers(0, 256)
        return
    place = at + offset + numbers.itemsize * (random.integers(0, 4) if dtype.subdtype else 0)
    view = spoilt.bytes[place : place + numbers.itemsize]
    modulus, now = 1 << (8 * numbers.itemsize), int.from_bytes(view.tobytes(), "little")
    near = [
        now + 1,
        now - 1,
        now * 2,
        now // 2,
        spoilt.size,
        spoilt.size - 1,
        spoilt.table,
        int(random.integers(2**62)),
    ]
    value = int(random.choice(np.array([v % modulus for v in INTERESTING + 3 * near], object)))
    view[:] = np.frombuffer(value.to_bytes(numbers.itemsize, "little"), np.uint8)


def _some_entry(spoilt: Spoilt, random: np.random.Generator) -> tuple[np.dtype[np.void], int]:
    i = int(random.integers(0, spoilt.num_rows))
    entries = [
        (layout.HEADER, 0),
        (layout.FIELD, layout.HEADER.itemsize),
        (layout.FIELD, layout.HEADER.itemsize + layout.FIELD.itemsize),
        (spoilt.row, layout.ROWS_START + i * spoilt.row.itemsize),
        (layout.ALLOCATION, spoilt.table + i * layout.ALLOCATION.itemsize),
    ]
    return entries[random.choice(5, p=[0.1, 0.1, 0.05, 0.45, 0.3])]


def both_pointers(spoilt: Spoilt, random: np.random.Generator) -> None:
    """A row's pointer and its entry in the table, alike: the two agree on a place that need not be one."""
    i = int(random.integers(0, spoilt.num_rows))
    row = spoilt.bytes[layout.ROWS_START + i * spoilt.row.itemsize :][: spoilt.row.itemsize].view(spoilt.row)
    entry = spoilt.bytes[spoilt.table + i * layout.ALLOCATION.itemsize :][: layout.ALLOCATION.itemsize]
    table, now = entry.view(layout.ALLOCATION), int(row["ptr"][0])
    places = [now + int(random.integers(-5000, 5000)), int(random.integers(0, spoilt.size)), spoilt.table - 5, 0, 2**50]
    place = max(0, int(random.choice(np.array(places, object))))
    row["ptr"], table["ptr"] = place, place
    if random.random() < 0.3:
        table["size"] = int(random.integers(0, 10_000))


def other_labels(spoilt: Spoilt, random: np.random.Generator) -> None:
    rows = spoilt.bytes[layout.ROWS_START :][: spoilt.num_rows * spoilt.row.itemsize].view(spoilt.row)
    rows["label"][random.integers(0, spoilt.num_rows)] = random.choice([0, 1, 2, 3, -3, 10**6])


def tables_bits(spoilt: Spoilt, random: np.random.Generator) -> None:
    end = layout.ROWS_START + spoilt.num_rows * spoilt.row.itemsize
    at = int(random.integers(0, end + spoilt.size - spoilt.table))
    at = at if at < end else at - end + spoilt.table
    spoilt.bytes[at] ^= 1 << random.integers(0, 8)


def pixels(spoilt: Spoilt, random: np.random.Generator) -> None:
    """Bytes of images, at random: flipped, zeroed, or others."""
    i = int(random.integers(0, spoilt.num_rows))
    start, size = int(spoilt.original._tables.offsets[i]), int(spoilt.original._tables.sizes[i])
    first = start + int(random.integers(0, size))
    length = min(int(random.choice([1, 1, 4, 64, 1024])), start + size - first)
    made = [random.integers(0, 256, length), np.zeros(length), spoilt.bytes[first : first + length] ^ 4]
    spoilt.bytes[first : first + length] = made[random.integers(0, 3)]


def jpeg_marker(spoilt: Spoilt, random: np.random.Generator) -> None:
    """A marker within an image, or its frame header with another size, channels or precision."""
    i = int(random.integers(0, spoilt.num_rows))
    start, size = int(spoilt.original._tables.offsets[i]), int(spoilt.original._tables.sizes[i])
    frame = spoilt.bytes[start : start + size].tobytes().find(b"\xff\xc0")
    if frame >= 0 and random.random() < 0.5:
        spoilt.bytes[start + frame + int(random.integers(2, 19))] = random.integers(0, 256)
        return
    at = start + int(random.integers(0, size - 1))
    spoilt.bytes[at : at + 2] = [0xFF, random.choice([0xD8, 0xD9, 0xDA, 0xC0, 0xC2, 0xC4, 0xDB, 0xDD, 0xD0, 0xFF])]


def slack(spoilt: Spoilt, random: np.random.Generator) -> None:
    """Bytes that belong to no image."""
    used = int((spoilt.original._tables.offsets + spoilt.original._tables.sizes).max())
    spoilt.bytes[random.integers(used, spoilt.table, 5)] ^= 0x55


def blocks(spoilt: Spoilt, random: np.random.Generator) -> None:
    """What storage does: 4 KiB lost, or in another block's place."""
    here, there = (int(b) * 4096 for b in random.integers(0, spoilt.size // 4096, 2))
    block = spoilt.bytes[there : there + 4096].copy()
    spoilt.bytes[here : here + 4096] = 0 if random.random() < 0.5 else block


def length(spoilt: Spoilt, random: np.random.Generator) -> None:
    ends = [0, 23, 24, layout.ROWS_START, spoilt.table, spoilt.size - 1, int(random.integers(0, spoilt.size))]
    if random.random() < 0.3:
        spoilt.bytes = np.concatenate([spoilt.bytes, np.zeros(random.choice([1, 24, 4096]), np.uint8)])
    else:
        spoilt.bytes = spoilt.bytes[: random.choice(ends)].copy()


def sidecar(spoilt: Spoilt, random: np.random.Generator) -> None:
    """A value of the sidecar, or a byte of it."""
    said = json.loads(spoilt.sidecar)
    key = str(random.choice(list(said)))
    values: list[Any] = [None, 0, -1, 2**70, "", "x", [], {}, [None], True, 1e308]
    said[key] = values[random.integers(0, len(values))]
    spoilt.json = json.dumps(said).encode()
    if random.random() < 0.3:
        torn = bytearray(spoilt.json)
        torn[random.integers(0, len(torn))] = random.integers(0, 256)
        spoilt.json = bytes(torn)


MUTATIONS: dict[Mutation, float] = {
    a_field: 0.34,
    both_pointers: 0.14,
    other_labels: 0.06,
    tables_bits: 0.1,
    pixels: 0.1,
    jpeg_marker: 0.08,
    slack: 0.04,
    blocks: 0.04,
    length: 0.05,
    sidecar: 0.05,
}
"""And how often."""


class Victim:
    """A process that reads files by FFCV when told; started anew when one has killed it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def read(self, path: Path, cut_to: int | None = None) -> dict[str, Any]:
        """{"pixels": sha256 of every row as FFCV gives it, "agrees": whether they are those NumPy reads}, or
        {"error"}, or {"died": signal or exit code}, or {"hung"}. With `cut_to`, of a file that is cut meanwhile."""
        patience = PATIENCE
        if self.process is None:
            patience = START
            command = [sys.executable, "-m", "tests.data_loaders.victim"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{path}\n" if cut_to is None else f"{path}\t{cut_to}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], patience)[0]:
            self.close()
            return {"hung": True}
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self.process.wait(60)
        self.close()
        return {"died": signal.Signals(-code).name if code < 0 else code}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


class NeverDecodes(torch_loader._Images):
    """Here, where a process that is started finds it."""

    def _decode(self, request: Request) -> NDArray[np.uint8]:
        time.sleep(600)
        raise AssertionError


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """Seconds for a proof, whatever came of it."""


def fuzz(originals: dict[str, Beton], victim: Victim, folder: Path, count: int, seed: int) -> Tally:
    """Make so many mutants, and try each as a run would: open, verify, and read by FFCV whatever passes the first."""
    tally = Tally()
    spoilt = {kind: Spoilt(original, folder / f"{kind}-mutant.beton") for kind, original in originals.items()}
    whole = {kind: victim.read(original.path) for kind, original in originals.items()}
    assert all(read.get("agrees") for read in whole.values()), whole
    for i in range(count):
        random = np.random.default_rng([seed, i])
        kind = str(random.choice(list(originals)))
        names = _mutate(spoilt[kind], random)
        forged = bool(random.random() < 0.5)
        spoilt[kind].write(forged=forged)
        what = f"mutant {i} of {kind}, {'forged' if forged else 'damaged'}: {' and '.join(names)}"
        for fault in _try(spoilt[kind], victim, whole[kind], tally, forged=forged):
            tally.failures.append(f"{what}: {fault}")
        spoilt[kind].restore()
    tally.counts["mutants"] = count
    return tally


def _mutate(spoilt: Spoilt, random: np.random.Generator) -> list[str]:
    mutations, often = list(MUTATIONS), np.array(list(MUTATIONS.values()))
    chosen = random.choice(len(mutations), random.choice([1, 1, 1, 2]), p=often / often.sum())
    # The length last: the others look for their places in a whole file.
    for k in sorted(chosen, key=lambda k: mutations[k] is length):
        mutations[k](spoilt, random)
    return [mutations[k].__name__ for k in chosen]


def _try(spoilt: Spoilt, victim: Victim, whole: dict[str, Any], tally: Tally, *, forged: bool) -> Iterator[str]:
    began = time.perf_counter()
    try:
        beton = Beton(spoilt.path)
    except InputError as error:
        tally.counts["refused when opened"] += 1
        if "\n" in str(error) or str(spoilt.path) not in str(error):
            yield f"the message is not a line that names the file: {error}"
        return
    finally:
        tally.slowest = max(tally.slowest, time.perf_counter() - began)
    verified = _verified(beton)
    tally.counts["accepted" if verified else "refused by its pages"] += 1
    changed = not np.array_equal(spoilt.bytes, spoilt.content)
    if verified and not forged and (changed or not _equal(beton, spoilt.original)):
        yield "other data was accepted"
    read = victim.read(spoilt.path)
    tally.counts["read by FFCV"] += 1
    if "died" in read or "hung" in read:
        tally.counts["crashed or hung"] += 1
        yield f"FFCV: {read}"
    elif verified and not forged and read != whole:
        yield f"FFCV gave {read} instead of {whole}"
    elif beton.sidecar["format"] != "jpg" and not read.get("agrees"):
        yield f"FFCV and NumPy read other pixels: {read}"


def _verified(beton: Beton) -> bool:
    try:
        beton.verify()
    except InputError:
        return False
    return True


def _equal(beton: Beton, original: Beton) -> bool:
    rows = range(len(original))
    return np.array_equal(beton.labels, original.labels) and all(beton.stored(i) == original.stored(i) for i in rows)


def digest(images: list[NDArray[np.uint8]]) -> str:
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
