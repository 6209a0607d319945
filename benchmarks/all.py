"""Nothing -> every table of benchmarks/results for this machine, then the report; about an hour on two cores.

    python -m benchmarks.all                    # --only serve forward: some tables; --list: the commands

Keep the machine free of other work meanwhile: all figures are times.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.jobs import JOBS, Job
from benchmarks.reporting.results import FOLDER, ROOT, chip_slug


def slug_of(job: Job) -> str:
    """The chip that a job measures, as part of its file's name."""
    import torch

    from benchmarks.measuring.measure import describe_machine

    return chip_slug(describe_machine(torch.device("cuda" if job.gpu else "cpu")))


def run_job(job: Job, slug: str) -> int:
    """Run one command in a process of its own; returns its exit code. A file that was there stays if it fails."""
    target = FOLDER / f"{job.name}-{slug}.json"
    fresh = target.with_suffix(".part")
    command = [sys.executable, "-m", *job.arguments.split(), "--json", str(fresh)]
    started = time.perf_counter()
    print(f"\n=== {job.command}", flush=True)
    code = run_command(command)
    print(f"=== {job.name}: status {code} after {time.perf_counter() - started:.0f} s", flush=True)
    if code == 0:
        keep(fresh, target, job)
    fresh.unlink(missing_ok=True)
    return code


def run_command(command: list[str]) -> int:
    """Run a command to its end; whatever ends this process first ends that one as well, and waits for it."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # not kill: it may have a server to stop
            process.wait()
            raise


def keep(fresh: Path, target: Path, job: Job) -> None:
    """Write the figures under their name, with the command and the table that they are of."""
    figures = {"job": job.name, "command": job.command, "table": job.table, **json.loads(fresh.read_text())}
    target.write_text(json.dumps(figures, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the jobs, then the report; the largest exit code of a job."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.all", description="Measure every table here."
    )
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these files only")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = [job for job in JOBS if not options.only or job.name in options.only]
    if options.list:
        print("\n".join(job.command for job in jobs))
        return 0
    FOLDER.mkdir(exist_ok=True)
    import torch  # after the arguments, and where something is measured

    if not torch.cuda.is_available():
        jobs = [job for job in jobs if not job.gpu]
    codes = [run_job(job, slug_of(job)) for job in jobs]
    report.main([])
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
