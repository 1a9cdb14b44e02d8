"""Records per second that processes append to one file at once: our ledger against Optuna's journal.

    python -m benchmarks.ledger
    python -m benchmarks.ledger --processes 1 4 16 --folder /mnt/shared

Both write the same records, one at a time, each synced to the disk before the next. A round does it with each in turn,
so that what else the machine does falls on both alike; what is claimed is the ratio within a round. Afterwards both
files are read, and every record must be there once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from benchmarks.loader import processor, spread
from tune.ledger import Ledger

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--records", type=int, default=800, help="in a round, over all processes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the temporary one")
    args = parser.parse_args()
    print(
        f"{args.rounds} rounds of {args.records} records; {processor()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, optuna {optuna.__version__}\n"
    )
    print("| processes | ledger, records/s: median (min-max) | journal, records/s | ledger / journal, within a round |")
    print("| --- | --- | --- | --- |")
    for num_processes in args.processes:
        rounds = [one_round(num_processes, args.records // num_processes, args.folder) for _ in range(args.rounds)]
        ours, theirs = ([rates[i] for rates in rounds] for i in (0, 1))
        ratios = [a / b for a, b in rounds]
        columns = [spread(ours, "{:,.0f}"), spread(theirs, "{:,.0f}"), spread(ratios, "{:.2f}")]
        print(f"| {num_processes} | {' | '.join(columns)} |")


def one_round(num_processes: int, num_each: int, folder: Path | None) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        ledger, journal = Path(temporary, "ledger.jsonl"), Path(temporary, "optuna.journal")
        ours = rate(num_processes, num_each, lambda: Ledger(ledger).append)
        theirs = rate(num_processes, num_each, lambda: to_journal(journal))
        check(Ledger(ledger).records(), num_processes, num_each)
        check(list(JournalFileBackend(str(journal)).read_logs(0)), num_processes, num_each)
    return ours, theirs


def to_journal(path: Path) -> Callable[[Record], object]:
    backend = JournalFileBackend(str(path))
    return lambda record: backend.append_logs([record])


def rate(num_processes: int, num_each: int, open_file: Callable[[], Callable[[Record], object]]) -> float:
    """Records per second, over all processes, the start of the processes included."""
    start = time.perf_counter()
    children = []
    for process in range(num_processes):
        child = os.fork()
        if child == 0:
            append = open_file()
            for number in range(num_each):
                append(
                    {
                        "kind": "rung",
                        "time": time.time(),
                        "trial": f"{process:016x}",
                        "epoch": number,
                        "sa": 0.9,
                        "ra": 0.5,
                    }
                )
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("error: a process failed; see its traceback above")
    return num_processes * num_each / (time.perf_counter() - start)


def check(records: list[Record], num_processes: int, num_each: int) -> None:
    expected = {(f"{process:016x}", number) for process in range(num_processes) for number in range(num_each)}
    assert {(record["trial"], record["epoch"]) for record in records} == expected
    assert len(records) == len(expected)


if __name__ == "__main__":
    main()
