"""The command `rlbook`: list, train, why, eval, plot, video, record, doctor.

Heavy modules are imported only when they are needed.
"""

import argparse
import contextlib
import io
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

from rlbook import __version__

TORCHRUN = "dppo"
"""The system whose workers torchrun may start; the others start their own processes."""

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2 with one line on stderr for bad input)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    launch = _launch()
    if launch is not None and launch.rank:
        from rlbook.plumbing.torchrun import serve

        return serve()
    try:
        if launch is not None and launch.size > 1:  # all else would let the other ranks wait
            if words[:2] != ["train", TORCHRUN] or {"-h", "--help"} & set(words):
                raise ValueError(f"torchrun starts `rlbook train {TORCHRUN} ...` and nothing else")
        options, rest = _parser().parse_known_args(words)
        if rest and options.command not in ("train", "record"):
            raise ValueError(f"{options.command}: unknown argument {rest[0]!r}")
        return options.run(options, rest)
    except (ValueError, OSError, MemoryError) as error:
        print(f"rlbook: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


def _launch() -> Any:
    """This process's place among the ranks that torchrun started; None if it did not."""
    if "RANK" not in os.environ:
        return None
    from rlbook.plumbing.torchrun import launched

    return launched()


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with errors as the one line that `main` prints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rlbook", description="Train and look at the systems of the book.")
    parser.add_argument("--version", action="version", version=f"rlbook {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, run: Callable[..., int], text: str, **more: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, **more)
        command.set_defaults(run=run)
        return command

    add("list", _list, "the systems, their presets and what each is")
    train = add(
        "train", _train, "train a system (rlbook train SYSTEM --help: its settings)", add_help=False
    )
    train.add_argument("system", nargs="?")
    train.add_argument("--trace", metavar="FILE")
    why = add("why", _why, "what bound a run, and what to change")
    why.add_argument("run_dir")
    record = add(
        "record", _record, "train over seeds and keep a record under results/", add_help=False
    )
    record.add_argument("name", nargs="?")
    record.add_argument("system", nargs="?")
    record.add_argument("--seeds", type=int, default=1)
    record.add_argument("--results-dir", default="results")
    record.add_argument("--no-policy", action="store_true")
    evaluate = add("eval", _eval, "fresh episodes of a trained policy")
    evaluate.add_argument("run_dir")
    evaluate.add_argument("--episodes", type=int, default=100)
    evaluate.add_argument("--seed", type=int, default=10_000)
    plot = add("plot", _plot, "learning curves of one or several runs as a picture")
    plot.add_argument("run_dirs", nargs="+", metavar="run_dir")
    plot.add_argument("--x", default="env_steps", choices=["env_steps", "wall_time_s"])
    plot.add_argument("--y", default="episode_return_mean")
    plot.add_argument("--out", default="curves.png")
    video = add("video", _video, "one fresh episode as an mp4")
    video.add_argument("run_dir")
    video.add_argument("--out", default=None)
    video.add_argument("--seed", type=int, default=10_000)
    doctor = add(
        "doctor", _doctor, "what this machine has, what is wrong with it and what to start on it"
    )
    doctor.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster to look at too")
    return parser


def _list(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.systems import SYSTEMS

    for name, text in SYSTEMS.items():
        print(f"{name:16} {text}")
    print(
        "\nrlbook train SYSTEM --help shows a system's settings,"
        " rlbook train SYSTEM --preset its presets."
    )
    return 0


def _config(system: str | None, words: list[str], command: str) -> Any:
    """A system's config from its preset (or the run to resume) and the flags in `words`."""
    from rlbook.harness.run import load_config, system_module
    from rlbook.harness.systems import SYSTEMS
    from rlbook.parts.stored import reading

    if system is None:
        raise ValueError(f"{command}: name a system, one of {', '.join(SYSTEMS)}")
    module = system_module(system)
    early = _Parser(add_help=False)
    early.add_argument("--preset", nargs="?", const="")
    early.add_argument("--resume")
    chosen, words = early.parse_known_args(words)
    if chosen.resume is not None:
        if chosen.preset is not None:
            raise ValueError("preset: a continued run keeps its settings; leave out --preset")
        stored, name = load_config(Path(chosen.resume))
        if name != system:
            raise ValueError(f"resume: {chosen.resume} is a run of {name}, not of {system}")
        with reading():  # its GPU may not be here: the flags may name another device
            base = replace(stored, resume=chosen.resume, run_dir=None)
    else:
        presets = getattr(module, "PRESETS", {"default": module.Config()})
        preset = "default" if chosen.preset is None else chosen.preset
        if preset not in presets:
            raise ValueError(f"preset: {system} has {', '.join(presets)}; got {preset!r}")
        base = presets[preset]
        if (launch := _launch()) is not None and system == TORCHRUN:
            base = replace(base, num_workers=launch.size)
    return _parse_config(type(base), base, words, f"rlbook {command} {system}")


def _parse_config(config_type: type, base: Any, words: list[str], program: str) -> Any:
    """tyro's command line for a dataclass, its error box squeezed into one line."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_type, default=base, args=words, prog=program)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_first_paragraph(complaint.getvalue())) from None


def _first_paragraph(box: str) -> str:
    """What tyro's box, of lines or of ASCII, says between its title and the next rule."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("╭╮╰╯│─+-| ") for line in plain.splitlines()]
    said = dropwhile(operator.not_, lines[1:])
    text = " ".join(takewhile(bool, said))
    return re.sub(r"^Error parsing (Config: )?", "", text)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.run import system_module

    if options.system is None and {"-h", "--help"} & set(rest):
        print(
            "usage: rlbook train SYSTEM [--preset P] [--resume RUN_DIR] [--trace FILE] [settings]\n"
            "\n--trace FILE writes who worked on what, to be opened at ui.perfetto.dev\n"
        )
        return _list(options, [])
    config = _config(options.system, rest, "train")
    if options.trace is not None:
        _check_trace(Path(options.trace), options.system, config)
    for name, only in (("wiring", "all_reduce"), ("runtime", "ray")) if _launch() else ():
        if (value := getattr(config, name, only)) != only:
            raise ValueError(f"{name}: torchrun starts processes for {only!r}, got {value!r}")
    if config.run_dir is None and config.resume is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{options.system}-{config.env_id.replace('/', '-')}-seed{config.seed}-{stamp}"
        config = replace(config, run_dir=str(Path("runs") / name))
    result = system_module(options.system).train(config)
    for line in summary_lines(result):
        print(line)
    if options.trace is not None:
        print(f"  who worked on what: {result.kept_spans().save(options.trace)}")
    return INTERRUPTED if result.stopped_because == "interrupted" else 0


def _check_trace(path: Path, system: str, config: Any) -> None:
    """ValueError before training if there will be nothing to write, or nowhere."""
    if not hasattr(config, "runtime"):
        raise ValueError(f"trace: {system} runs in one process: there is nothing to trace")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"trace: {path} is no file in a folder that exists")


def summary_lines(result: Any) -> list[str]:
    """What a run came to, for people."""
    metrics = result.metrics
    where = f"{result.system} on {result.config.env_id}, seed {result.config.seed}"
    lines = [f"{where}: {result.stopped_because}"]
    if result.env_steps:
        lines.append(
            f"  {result.env_steps:,} env steps in {result.wall_time_s:.2f} s of training"
            f" ({metrics['env_steps_per_s']:,.0f} a second), {result.learner_steps:,} updates"
        )
    if metrics.get("episode_return_mean") is not None:
        lines.append(f"  training return {metrics['episode_return_mean']:.1f} (last episodes)")
    if metrics.get("evaluation_return_mean") is not None:
        lines.append(f"  confirmed by 100 fresh episodes: {metrics['evaluation_return_mean']:.1f}")
    if result.run_dir is not None:
        lines.append(f"  kept in {result.run_dir}")
    return lines


def _record(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.records import make_record

    if {"-h", "--help"} & set(rest) and options.system is None:
        print(
            "usage: rlbook record NAME SYSTEM [--seeds N] [--results-dir DIR] [--no-policy]"
            " [settings]\n"
        )
        return _list(options, [])
    if options.name is None or options.system is None:
        raise ValueError("record: give a name and a system: rlbook record NAME SYSTEM [settings]")
    config = _config(options.system, rest, "record")
    command = " ".join(["rlbook", "record", options.name, options.system, *rest])
    if options.seeds != 1:
        command += f" --seeds {options.seeds}"
    folder = Path(options.results_dir) / options.name
    if options.no_policy:
        command += " --no-policy"
    keeps = not options.no_policy
    path = make_record(folder, options.system, config, options.seeds, command, keeps)
    print(f"record kept in {path}")
    return 0


def _why(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.run import Result

    print(Result.load(options.run_dir).why())
    return 0


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.run import Result

    result = Result.load(options.run_dir)
    print(f"{result.system} on {result.config.env_id}: ", end="")
    print(result.evaluate(options.episodes, options.seed))
    return 0


def _plot(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.plots import learning_curves
    from rlbook.harness.run import Result

    runs: dict[str, list[Any]] = {}
    for folder in options.run_dirs:
        result = Result.load(folder)
        runs.setdefault(f"{result.system} on {result.config.env_id}", []).append(result)
    learning_curves(runs, x=options.x, y=options.y).savefig(options.out)
    print(f"drawn to {options.out}")
    return 0


def _video(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.run import Result

    out = options.out or str(Path(options.run_dir) / "episode.mp4")
    episode_return = Result.load(options.run_dir).video(out, seed=options.seed)
    print(f"an episode of return {episode_return:.1f} is in {out}")
    return 0


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from rlbook.harness.doctor import examine, here
    from rlbook.harness.placement import Host, lines

    findings = examine()
    for finding in findings:
        print(finding)
    hosts = [here()]
    if options.ray_address is not None:
        from rlbook.plumbing.joining import hosts_of
        from rlbook.plumbing.runtime import RayRuntime

        with RayRuntime(address=options.ray_address):
            hosts = [Host(*host) for host in hosts_of()]
    print("\n" + "\n".join(lines(hosts)))
    return 1 if any(finding.wrong for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
