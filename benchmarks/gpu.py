"""Every record that needs a GPU, by one command, the most important first.

    python -m benchmarks.gpu [--only NAME …] [--skip NAME …] [--budget MINUTES] [--list]
                             [--results-dir DIR] [--archive FILE.tar] [--commit HASH] [--rehearse]

Each is saved the moment it is there: runs by `rlbook record …` in results/gpu-…, measurements in
results/gpu-…/ as the benchmark that they are. What is there already is not made again, so that the
command, said again, goes on where the time was over. A job that would take longer than what is left
of the budget is not begun; one that takes longer than its own time is ended, with all its
processes. `--archive` keeps all that was made in one tar file, written anew after each job.

The jobs "throughput" come before those "until solved": what a run may take in steps follows from
the measured rate, so that it is over, and recorded, when its time is.

Where the code lies without its history, `--commit` says what it is. `--rehearse` does all of it
with tiny budgets, on whatever is there: no figure of it means anything.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common import ROOT, end_family, note
from rlbook.harness.records import COMMIT

GOAL = 18.0
SMALL = {
    "impala": "--num-actors 2 --num-envs 2 --unroll-length 4",
    "seed_rl": "--num-workers 2 --num-envs 2 --groups 1 --unroll-length 4 --num-inference 1",
    "apex": "--num-actors 1 --num-envs 2 --unroll-length 5 --batch-size 4 --learning-starts 10"
    " --replay-capacity 1000 --rate-tolerance 100 --num-replays 1",
    "dppo": "--num-workers 2 --num-envs 2 --unroll-length 4 --minibatch-size 8 --epochs 1",
    "r2d2": "--num-actors 1 --num-envs 2 --sequence-length 4 --sequence-overlap 2"
    " --burn-in-length 2 --unroll-length 6 --batch-size 2 --learning-starts 2"
    " --replay-capacity 50 --num-replays 1 --lstm-size 8",
}
"""What a rehearsal changes of a system's preset `one_gpu`."""
TINY_STEPS = 60


@dataclass(frozen=True)
class Asked:
    """What all jobs are told."""

    results: Path
    rehearse: bool


@dataclass(frozen=True)
class Job:
    """One record."""

    name: str
    minutes: float
    """At most, starting processes and evaluations included."""
    command: Callable[["Job", Asked], list[str]]
    """Words behind `python -m`."""

    def made(self, asked: Asked) -> bool:
        """Whether it is there."""
        folder = asked.results / self.name
        return folder.is_dir() and any(folder.glob("*.json"))


def trained(
    system: str, flags: str, until_solved: bool, job: Job, asked: Asked, seconds: float
) -> list[str]:
    """A run of the preset `one_gpu` for about so many seconds."""
    words = ["rlbook", "record", job.name, system, "--results-dir", str(asked.results)]
    words += ["--preset", "one_gpu", "--no-policy", "--no-progress", *flags.split()]
    if until_solved:
        words += ["--stop-at-return", str(GOAL)]
    if asked.rehearse:
        tiny = f"--total-env-steps {TINY_STEPS} --torch-threads 1"
        return [*words, *SMALL[system].split(), *tiny.split()]
    if (rate := measured_rate(asked.results / f"gpu-{system}-throughput")) is not None:
        words += ["--total-env-steps", str(int(rate * seconds))]
    return words


def measured_rate(folder: Path) -> float | None:
    """Environment steps a second of a record's run; None if there is no such record."""
    path = folder / "record.json"
    if not path.is_file():
        return None
    return float(json.loads(path.read_text())["runs"][0]["metrics"]["env_steps_per_s"])


def run(system: str, minutes: float, flags: str = "", until_solved: bool = True) -> Callable:
    """The command of a run that trains for `minutes`."""

    def command(job: Job, asked: Asked) -> list[str]:
        return trained(system, flags, until_solved, job, asked, 60 * minutes)

    return command


def learners(job: Job, asked: Asked) -> list[str]:
    """`benchmarks.learners`."""
    quick = ["--quick"] if asked.rehearse else []
    return ["benchmarks.learners", *quick, "--out", str(asked.results / job.name)]


def tests(job: Job, asked: Asked) -> list[str]:
    """All tests that need a GPU; where there is none, they are skipped, which is no record."""
    report = asked.results / job.name / "tests.json"
    return ["benchmarks.gpu", "--run-tests", str(report), *(["--rehearse"] * asked.rehearse)]


def throughput(system: str, steps: int, flags: str = "") -> Callable:
    """A run of so many steps, for its rate beside the ceiling of its environments."""
    return run(system, 0.0, f"--total-env-steps {steps} {flags}", until_solved=False)


TWO = "--num-learners 2 --gpus-per-learner 0.5 --learner-backend gloo"
JOBS = (
    Job("gpu-impala-throughput", 2.0, throughput("impala", 600_000)),
    Job("gpu-seed_rl-throughput", 2.0, throughput("seed_rl", 1_500_000)),
    Job("gpu-impala-pong", 9.5, run("impala", 7.5)),
    Job("gpu-seed_rl-pong", 9.5, run("seed_rl", 7.5)),
    Job("gpu-learners", 4.0, learners),
    Job("gpu-tests", 4.0, tests),
    Job("gpu-impala-two-ranks", 2.0, throughput("impala", 300_000, TWO)),
    Job("gpu-apex-throughput", 2.0, throughput("apex", 300_000)),
    Job("gpu-apex-pong", 9.5, run("apex", 7.5)),
    Job("gpu-dppo-throughput", 2.0, throughput("dppo", 300_000)),
    Job("gpu-dppo-pong", 9.5, run("dppo", 7.5)),
    Job("gpu-seed_rl-resnet", 2.5, throughput("seed_rl", 1_000_000, "--torso resnet")),
    Job("gpu-r2d2-pong", 9.5, run("r2d2", 7.5)),
)


def perform(job: Job, asked: Asked, commit: str | None) -> str:
    """Does one job; a word on how it went."""
    words = job.command(job, asked)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if commit is not None:
        environment[COMMIT] = commit
    log = asked.results / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, stdout=output, stderr=output, env=environment
        )
        try:
            code = process.wait(60 * job.minutes)
        except subprocess.TimeoutExpired:
            end_family(process)
            return "took too long"
        except BaseException:
            end_family(process)
            raise
    if code or not job.made(asked):
        return f"failed (exit code {code}): {last_words(log)}"
    log.unlink()
    return "made"


def last_words(log: Path) -> str:
    """The end of what a job said, on one line."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])


def archive(path: Path, asked: Asked, names: Sequence[str]) -> None:
    """All that these jobs left in one tar file, whole or not there."""
    fresh = path.with_suffix(".part")
    with tarfile.open(fresh, "w") as tar:
        for name in names:
            for found in sorted(asked.results.glob(f"{name}*")):
                tar.add(found, arcname=f"results/{found.name}")
    fresh.replace(path)


def run_tests(report: Path, rehearse: bool) -> int:
    """`pytest -m cuda`: how many passed, were skipped and failed, with machine and commit; 1 where
    there is no GPU and it is no rehearsal.
    """
    import torch

    if not (rehearse or torch.cuda.is_available()):
        print("no GPU here: all would be skipped")
        return 1
    from rlbook.harness.records import _commit, machine
    from rlbook.harness.run import versions

    words = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests", "-p", "no:cacheprovider"]
    begun = time.monotonic()
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(found.stdout[-4000:])
    document = {
        "command": "python -m pytest -m cuda tests",
        "machine": machine(),
        "versions": versions(),
        "commit": _commit(),
        "seconds": round(time.monotonic() - begun, 1),
        "exit_code": found.returncode,
        "summary": found.stdout.strip().splitlines()[-1] if found.stdout.strip() else "",
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    names = [job.name for job in JOBS]
    flags = argparse.ArgumentParser(description="Every record that needs a GPU.")
    flags.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    flags.add_argument("--skip", nargs="+", default=[], choices=names, metavar="NAME")
    flags.add_argument("--budget", type=float, default=30.0, help="minutes for all")
    flags.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    flags.add_argument("--results-dir", type=Path, default=ROOT / "results")
    flags.add_argument("--archive", type=Path, default=None)
    flags.add_argument("--commit", default=None)
    flags.add_argument("--rehearse", action="store_true")
    flags.add_argument("--run-tests", type=Path, default=None, help=argparse.SUPPRESS)
    return flags.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Job after job, as long as there is time; 1 if any failed."""
    options = options_of(arguments)
    if options.run_tests is not None:
        return run_tests(options.run_tests, options.rehearse)
    asked = Asked(options.results_dir.resolve(), options.rehearse)
    chosen = [job for job in JOBS if job.name in options.only and job.name not in options.skip]
    left, failed = partial(_left, time.monotonic() + 60 * options.budget), False
    for job in chosen:
        if job.made(asked):
            note(f"{job.name}: is there")
        elif options.list:
            note(f"{job.name}: {job.minutes} min: python -m {' '.join(job.command(job, asked))}")
        elif left() < job.minutes and not options.rehearse:
            note(f"{job.name}: no time left ({left():.1f} of {job.minutes} min)")
        else:
            begun = time.monotonic()
            how = perform(job, asked, options.commit)
            note(f"{job.name}: {how}, {time.monotonic() - begun:.0f} s")
            failed |= how != "made"
            if options.archive is not None:
                archive(options.archive, asked, [one.name for one in chosen])
    return int(failed)


def _left(end: float) -> float:
    return (end - time.monotonic()) / 60


if __name__ == "__main__":
    sys.exit(main())
