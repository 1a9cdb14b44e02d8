"""What was committed is read again, whatever happens to a process, the disk or the file.

Run as a script (`python test_ledger.py crowd|endless PATH`) it is the processes that append: a crowd at once, or one
that goes on until it is killed and says after every record that it is in.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from robustscale.errors import InputError
from tune.ledger import Ledger

Record = dict[str, Any]

NUM_PROCESSES, NUM_EACH = 16, 25


def record(number: int) -> Record:
    return {"kind": "ended", "time": 1e9 + number / 3, "trial": f"{number:016x}", "sa": 0.1 * number, "reason": None}


def written(path: Path, num_records: int) -> list[Record]:
    records = [record(number) for number in range(num_records)]
    for each in records:
        Ledger(path).append(each)
    return records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sweep" / "ledger.jsonl"


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A path where syncing is free, for tests that do it thousands of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder, "ledger.jsonl")


# --- Writing and reading


def test_records_are_read_back_in_the_order_they_were_written(path: Path) -> None:
    records = [*written(path, 5), {"kind": "asked", "time": 0, "values": {"ε": [1, None, True, "a\nb\u2028"]}}]
    Ledger(path).append(records[-1])
    assert Ledger(path).records() == records


def test_a_line_is_the_checksum_and_the_json(path: Path) -> None:
    (expected,) = written(path, 1)
    match = re.fullmatch(rb"([0-9a-f]{8}) (\{.*\})\n", path.read_bytes())
    assert match is not None
    assert int(match[1], 16) == zlib.crc32(match[2])
    assert json.loads(match[2]) == expected


def test_a_ledger_that_is_not_there_is_empty_and_reading_does_not_make_it(path: Path) -> None:
    assert Ledger(path).records() == []
    assert not path.parent.exists()


def test_the_time_is_added_and_what_was_written_is_returned(path: Path) -> None:
    returned = Ledger(path).append({"kind": "rung", "epoch": 1})
    assert Ledger(path).records() == [returned]
    assert isinstance(returned["time"], float)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), {1, 2}, b"x", object()])
def test_what_is_not_json_is_refused_and_nothing_is_written(path: Path, value: object) -> None:
    before = written(path, 1)
    with pytest.raises((ValueError, TypeError)):
        Ledger(path).append({"kind": "rung", "figures": {"sa": [value]}})
    assert Ledger(path).records() == before


def test_what_another_process_adds_is_seen(path: Path) -> None:
    first = Ledger(path)
    for number in range(5):
        Ledger(path).append(record(number))
        assert first.records() == [record(n) for n in range(number + 1)]


def num_calls(function: Callable[[], object]) -> int:
    """Of Python and C functions: work that, unlike time, is the same on every machine."""
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_reading_costs_a_constant_a_line_and_only_new_lines_are_read(path: Path) -> None:
    written(path, 10)
    lines = path.read_bytes()
    small = num_calls(lambda: Ledger(path).records())
    path.write_bytes(lines * 3000)
    ledger = Ledger(path)
    assert len(ledger.records()) == 30_000
    assert num_calls(lambda: Ledger(path).records()) < 3000 * small
    Ledger(path).append(record(0))
    assert num_calls(ledger.records) < small
    assert len(ledger.records()) == 30_001


# --- Damage


def test_a_tail_torn_at_any_byte_costs_that_record_alone(in_memory: Path) -> None:
    for num_before in (0, 3):
        in_memory.unlink(missing_ok=True)
        before = written(in_memory, num_before)
        start = in_memory.stat().st_size if num_before else 0
        Ledger(in_memory).append(record(7))
        whole = in_memory.read_bytes()
        for end in range(start, len(whole)):
            in_memory.write_bytes(whole[:end])
            torn = Ledger(in_memory)
            assert torn.records() == before
            torn.append(record(8))
            assert torn.records() == Ledger(in_memory).records() == [*before, record(8)]
            assert torn.damaged == []


def test_a_damaged_line_is_skipped_counted_and_told_once(path: Path) -> None:
    records = written(path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"sa":0.2', b'"sa":0.9')
    path.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=r"ledger.jsonl: line 3: .*the other 4 records are intact; restore .*--resume"):
        ledger = Ledger(path)
    ledger.append(record(9))
    assert ledger.records() == [*records[:2], *records[3:], record(9)]
    assert ledger.damaged == [3]
    path.write_bytes(path.read_bytes() + b"no record\n")
    with pytest.warns(UserWarning, match=r"line 7: .*2 in all\), the other 5"):
        ledger.records()


def mutated(content: bytes, draw: random.Random) -> bytes:
    kind, at = draw.choice(["truncate", "flip", "glue"]), draw.randrange(len(content) + 1)
    if kind == "truncate":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes(byte ^ 1 << draw.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :]
    lines = content.splitlines(keepends=True)
    line = draw.choice(lines)
    place = sum(map(len, lines[: draw.randrange(len(lines) + 1)]))
    return content[:place] + line[: draw.randrange(len(line))] + content[place:]


@pytest.mark.parametrize("seed", range(20))
def test_any_damage_costs_the_damaged_lines_alone(in_memory: Path, seed: int) -> None:
    """100 cases a seed."""
    draw = random.Random(seed)
    originals = written(in_memory, 6)
    sound = in_memory.read_bytes()
    of_line = dict(zip(sound.split(b"\n")[:-1], originals, strict=True))
    for _ in range(100):
        content = sound
        for _ in range(draw.randrange(1, 4)):
            content = mutated(content, draw) if content else content
        in_memory.write_bytes(content)
        # What still stands there letter for letter, newline included.
        intact = [of_line[line] for line in content.split(b"\n")[:-1] if line in of_line]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                ledger = Ledger(in_memory)
            except InputError:
                assert not intact and in_memory.read_bytes() == content
                continue
            num_damaged = content.count(b"\n") - len(intact)
            assert len(ledger.damaged) == num_damaged and len(told) == (num_damaged > 0)
            ledger.append(record(9))
            assert ledger.records() == Ledger(in_memory).records() == [*intact, record(9)]


@pytest.mark.parametrize(
    "content",
    [
        b"a note\n",
        b'{"kind": "sweep"}',
        b'{"kind": "sweep"}\n',
        b"\x80\x00\xff" * 99,
        b"\n",
        b"00000000 \n",
        b"0123456z",
    ],
)
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^\S*ledger.jsonl: no ledger .* take another .*$"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        Ledger(path)


# --- Disks


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_at_any_byte_leaves_the_records_before_it(path: Path) -> None:
    before = written(path, 2)
    start, ledger = path.stat().st_size, Ledger(path)
    ledger.append(record(7))
    end = path.stat().st_size
    os.truncate(path, start)
    for size in range(start, end):
        with (
            file_size_limit(size),
            pytest.raises(InputError, match=r"File too large.*are intact: free space .*--resume"),
        ):
            ledger.append(record(7))
        assert path.stat().st_size == start
    ledger = Ledger(path)
    ledger.append(record(8))
    assert ledger.records() == [*before, record(8)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    ledger = Ledger(small_disk / "ledger.jsonl")
    records: list[Record] = []

    def fill() -> None:
        for number in range(1000):
            records.append(ledger.append({**record(number), "reason": "x" * 500}))

    with pytest.raises(InputError, match=r"ledger.jsonl: .*No space left on device.* free space") as refused:
        fill()
    assert "\n" not in str(refused.value)
    assert len(records) > 30
    assert ledger.records() == Ledger(ledger.path).records() == records
    assert ledger.append(record(0)) == record(0)


def test_a_path_that_leads_nowhere_is_refused(path: Path) -> None:
    written(path, 1)
    with pytest.raises(InputError, match=r"cannot be read \(Not a directory\); check the path"):
        Ledger(path / "ledger.jsonl")


# --- Processes


def crowd(path: Path) -> None:
    """Processes that append at once."""
    children = []
    for process in range(NUM_PROCESSES):
        child = os.fork()
        if child == 0:
            ledger = Ledger(path)
            for number in range(NUM_EACH):
                ledger.append({"kind": "rung", "process": process, "number": number, "text": "x" * (37 * process)})
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


def endless(path: Path) -> None:
    ledger, number = Ledger(path), len(Ledger(path).records())
    while True:
        ledger.append(record(number))
        print(number, flush=True)
        number += 1


def start(what: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, what, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_of_many_processes_no_record_is_lost_or_interleaved(path: Path) -> None:
    process = start("crowd", path)
    process.communicate()
    assert process.returncode == 0
    ledger = Ledger(path)
    found = ledger.records()
    assert ledger.damaged == []
    assert len(found) == NUM_PROCESSES * NUM_EACH
    for process_number in range(NUM_PROCESSES):
        mine = [each["number"] for each in found if each["process"] == process_number]
        assert mine == list(range(NUM_EACH))


def test_threads_that_share_a_ledger(path: Path) -> None:
    ledger = Ledger(path)
    threads = [threading.Thread(target=lambda: [ledger.append(record(n)) for n in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.records()) == 80 and ledger.damaged == []


def test_what_a_killed_process_committed_is_there(path: Path) -> None:
    for _ in range(3):
        before = len(Ledger(path).records())
        process = start("endless", path)
        assert process.stdout is not None
        for _ in range(20):
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        last = max([last, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        found = Ledger(path).records()
        assert before <= last and last + 1 <= len(found) <= last + 2
        assert found == [record(number) for number in range(len(found))]


if __name__ == "__main__":
    {"crowd": crowd, "endless": endless}[sys.argv[1]](Path(sys.argv[2]))
