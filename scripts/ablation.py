"""Run an ablation study: train each row for each seed by the recipes, compare the rows with intervals.

    python scripts/ablation.py recipes/configs/studies/options.yaml --seeds 0 1 2 --output_dir runs/studies

The output folder gets one folder for each command, named by what determines its result: its settings, the files that
it reads and the code. What is done is not done again, also for another study; a run that was stopped resumes. Start the
same command in several terminals, or on machines that share the folder, to divide the work. <output_dir>/<study> gets
results.html, the same as .md, .json and .csv, and results.png, written anew after each row.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser

if TYPE_CHECKING:
    from hf_seg.studies.ablation_plan import Plan, Step

POLL = 2.0  # seconds, while other processes work on all that is left
RESUMES = ("recipes/stage1.py", "recipes/stage2.py", "recipes/pseudo_label.py")  # what they left is continued


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--rows", metavar="ROW", nargs="+", help="only these, and what they need")
    parser.add_argument("--worlds", metavar="WORLD", nargs="+", help="only these datasets or folds")
    parser.add_argument("--output_dir", metavar="DIR", type=Path, default=Path("runs/studies"), help="(%(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of each command on a CPU (%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are left, run nothing")
    options: argparse.Namespace = parser.parse_args(arguments)
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds must differ from each other; they are {options.seeds}")
    return options


def run_step(step: "Step", threads: int) -> None:
    """Run a command, with its output in a log file beside its folder, and record that it is done.

    Raises:
        UserError: it failed; with the last line it printed.
    """
    from hf_seg.files import remove, write_atomic
    from hf_seg.studies.ablation import PROJECT

    resumed = step.folder.exists()
    if resumed and step.script not in RESUMES:
        remove(step.folder)
    log = step.folder.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(PROJECT)}
    started = time.monotonic()
    with log.open("wb") as file:
        options = {"stdout": file, "stderr": file, "env": environment, "cwd": PROJECT}
        ended = subprocess.run([sys.executable, *step.command()], **options, check=False)
    if ended.returncode:
        words = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(words) if line.strip()), "it printed nothing")
        raise UserError(
            f"{step.script} failed: {last.strip()[-300:]} (log: {log}; command: {' '.join(step.command())})"
        )
    shutil.rmtree(step.folder / "checkpoints", ignore_errors=True)
    seconds = None if resumed else round(time.monotonic() - started, 1)
    write_atomic(step.record, json.dumps({"command": step.command(), "seconds": seconds}, indent=1) + "\n")


def run_plan(plan: "Plan", threads: int, seeds: list[int], folder: Path) -> None:
    """Run all steps, parents first, beside other processes that do the same."""
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    from hf_seg.studies.ablation_report import summarize, write_results

    scores = {step.folder for step in plan.scores.values()}
    left = [step for step in plan.steps if not step.record.is_file()]
    with tqdm(total=len(plan.steps), initial=len(plan.steps) - len(left), desc=folder.name, unit="step") as bar:
        while left:
            ran = False
            for step in left:
                if step.record.is_file() or not all(parent.record.is_file() for parent in step.parents):
                    continue
                try:
                    with FileLock(f"{step.folder}.lock", timeout=0):
                        if not step.record.is_file():
                            bar.set_postfix_str(step.folder.name)
                            run_step(step, threads)
                            ran = True
                except Timeout:
                    continue
                summary = summarize(plan, seeds) if step.folder in scores else {"rows": []}
                if summary["rows"]:  # none before all folds are done
                    write_results(summary, folder)
                break
            left = [step for step in left if not step.record.is_file()]
            bar.update(len(plan.steps) - len(left) - bar.n)
            if left and not ran:
                time.sleep(POLL)


def main(arguments: list[str] | None = None) -> None:
    """Plan, run, report; a user's mistake is one line on stderr."""
    with one_line_errors():
        options = parse(arguments)
        from hf_seg.studies.ablation import read_study
        from hf_seg.studies.ablation_plan import Plan

        study = read_study(options.study)
        root: Path = options.output_dir.resolve()
        plan = Plan(study, options.seeds, root, options.rows, options.worlds)
        if options.dry_run:
            for step in plan.steps:
                print(f"{'done' if step.record.is_file() else 'left'}  python {' '.join(step.command())}")
            return

        from hf_seg.studies.ablation_report import summarize, write_results

        root.mkdir(parents=True, exist_ok=True)
        run_plan(plan, options.threads, options.seeds, root / study.name)
        summary = summarize(plan, options.seeds)
        write_results(summary, root / study.name)
        for each in summary["comparisons"]:
            name = f"{each['row']} - {each['against']}" + (f", {each['world']}" if each["world"] else "")
            print(f"{name}: {each['value']:+.1f} points [{each['low']:+.1f}, {each['high']:+.1f}], {each['result']}")
        print(f"results: {root / study.name / 'results.html'}")


if __name__ == "__main__":
    main()
