"""How long `import rlbook` and `rlbook list` take, in fresh processes.

python -m benchmarks.imports [--quick]
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.common import ROOT, Row, keep, parser, print_targets, table, target

IMPORT = """
import json, sys, time
begun = time.perf_counter()
import rlbook
seconds = time.perf_counter() - begun
print(json.dumps([seconds, sorted({"torch", "ray"} & set(sys.modules))]))
"""
LIST = "import sys; from rlbook.cli import main; sys.exit(main(['list']))"


def import_seconds() -> tuple[float, list[str]]:
    """Seconds of `import rlbook`, and which heavy packages it brought along."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, heavy = json.loads(done.stdout)
    return seconds, heavy


def process_seconds(code: str) -> float:
    """Seconds of a whole Python process."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> None:
    """Medians over fresh processes, in turns."""
    options = parser("Seconds of `import rlbook` and `rlbook list`.").parse_args(arguments)
    imports, lists, nothing = [], [], []
    heavy: set[str] = set()
    for _ in range(2 if options.quick else 15):
        seconds, brought = import_seconds()
        imports.append(seconds)
        heavy.update(brought)
        lists.append(process_seconds(LIST))
        nothing.append(process_seconds("pass"))
    rows: list[Row] = [
        {"what": "import rlbook", "seconds": statistics.median(imports)},
        {"what": "rlbook list (whole process)", "seconds": statistics.median(lists)},
        {"what": "an empty Python process", "seconds": statistics.median(nothing)},
    ]
    table("Start-up", rows, ("what", "seconds"))
    targets = [
        target("import rlbook: seconds", rows[0]["seconds"], most=0.1),
        target("torch or ray imported along", len(heavy), most=0),
    ]
    print_targets([] if options.quick else targets)
    keep("imports", rows, [] if options.quick else targets, options)


if __name__ == "__main__":
    main()
