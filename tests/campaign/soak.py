"""Train both stages for hours and check that memory, open files, threads and disk stay flat.

    python tests/campaign/soak.py --minutes 120 --output runs/soak

Stage 1 and stage 2 train side by side on a small synthetic dataset, with a validation and a checkpoint every few
minutes. Every ten seconds the process tree of each is measured. At the end both get SIGTERM and must stop in order.
Writes samples.csv, soak.png, summary.json and the table of docs/reliability.md; the exit code is 1 if anything grows.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
SECONDS_BETWEEN_SAMPLES = 10
SETTINGS = "--max_train_steps 1000000 --checkpointing_steps 100 --eval_steps 100 --dataloader_num_workers 1"
# what the last quarter may have more than the second, as a fraction and in absolute terms
LIMITS = {"rss_mib": (0.05, 20), "files": (0, 2), "threads": (0, 2), "disk_mib": (0.05, 5)}


def main() -> int:
    """Run both stages, write what was measured, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    output = args.output.absolute()
    data = output / "data"
    if not data.exists():
        sizes = "--source 20 --train 20 --val 10 --test 10 --size 192"
        _hf_seg(f"synth --output {data} {sizes}").wait()
    sar = data / "dfc25_track1"
    commands = {
        "stage1": f"stage1 --config toy/stage1_efficientnet_lite.yaml --source_dir {data}/OpenEarthMap_wo_xBD",
        "stage2": "stage2 --config toy/stage2_efficientnet_lite.yaml",
    }
    started = {}
    for stage, command in commands.items():
        log = (output / f"{stage}.log").open("w")
        command += f" --data_dir {sar} --output_dir {output / stage} --resume_from_checkpoint latest {SETTINGS}"
        started[stage] = _hf_seg(command, log)
    samples = _sample(started, output, args.minutes)
    codes = {}
    for stage, process in started.items():
        process.send_signal(signal.SIGTERM)
        codes[stage] = process.wait(600)
    samples.to_csv(output / "samples.csv", index=False)
    _plot(samples, output / "soak.png")
    grown = summarize(samples)
    orderly = all(code == 128 + signal.SIGTERM for code in codes.values())
    is_flat = not grown.empty and not grown["grows"].any()
    steps = {stage: _last_step(output / stage) for stage in commands}
    summary = {"minutes": args.minutes, "steps": steps, "exit_codes": codes, "measures": grown.to_dict("records")}
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    write_table(summary)
    print(grown.to_string(index=False), steps, codes, sep="\n")
    return 0 if is_flat and orderly else 1


def write_table(summary: dict[str, Any]) -> None:
    """Write what `write_reliability.py` reads."""
    titles = {"rss_mib": "memory, MiB", "files": "open files", "threads": "threads", "disk_mib": "output folder, MiB"}
    rows = [
        {
            "stage": each["stage"].replace("stage", "stage "),
            "steps": summary["steps"][each["stage"]],
            "measure": titles[each["measure"]],
            **{part.replace("_", " "): f"{each[part]:.0f}" for part in ("second_quarter", "last_quarter", "highest")},
            "grows": "yes" if each["grows"] else "no",
        }
        for each in summary["measures"]
    ]
    content = {
        "command": "`make soak`",
        "seed": 0,
        "seconds": round(60 * summary["minutes"]),
        "failed": 0,
        "rows": rows,
    }
    table = ROOT / "runs" / "campaign" / "soak" / "all.json"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(content, indent=1))


def _hf_seg(words: str, log: object = None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_seg.cli", *words.split()]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)  # type: ignore[call-overload]


def _sample(started: dict[str, subprocess.Popen[bytes]], output: Path, minutes: float) -> pd.DataFrame:
    rows = []
    start = time.monotonic()
    while time.monotonic() < start + 60 * minutes:
        time.sleep(SECONDS_BETWEEN_SAMPLES)
        for stage, process in started.items():
            if process.poll() is not None:
                raise SystemExit(f"{stage} ended with {process.returncode}; see {output / stage}.log")
            disk = sum(each.stat().st_size for each in (output / stage).rglob("*") if each.is_file()) / 2**20
            row = {"minute": (time.monotonic() - start) / 60, "stage": stage, "disk_mib": disk}
            rows.append(row | measure_tree(process.pid))
    return pd.DataFrame(rows)


def measure_tree(pid: int) -> dict[str, float]:
    """Return memory, open files, threads and the number of a process and all that it started."""
    total = {"rss_mib": 0.0, "files": 0, "threads": 0, "processes": 0}
    for each in [pid, *_descendants(pid)]:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
            files = len(os.listdir(f"/proc/{each}/fd"))
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        total["rss_mib"] += int(status.get("VmRSS", "0 kB").split()[0]) / 1024
        total["files"] += files
        total["threads"] += int(status["Threads"])
        total["processes"] += 1
    return total


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += [each for child in children for each in (child, *_descendants(child))]
    return found


def summarize(samples: pd.DataFrame) -> pd.DataFrame:
    """Compare the second quarter of the time with the last; the first is warm-up.

    Medians, since workers start and end with each validation, and the number of checkpoints alternates.
    """
    rows = []
    for stage, of_stage in samples.groupby("stage"):
        end = of_stage["minute"].max()
        before = of_stage[of_stage["minute"].between(end / 4, end / 2)]
        after = of_stage[of_stage["minute"] > 3 * end / 4]
        for name, (fraction, absolute) in LIMITS.items():
            first, last = before[name].median(), after[name].median()
            grows = bool(last > first + max(fraction * first, absolute))
            row = {"stage": stage, "measure": name, "second_quarter": first, "last_quarter": last}
            rows.append(row | {"highest": of_stage[name].max(), "grows": grows})
    return pd.DataFrame(rows)


def _plot(samples: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    titles = {"rss_mib": "memory, MiB", "files": "open files", "threads": "threads", "disk_mib": "output folder, MiB"}
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        for stage, of_stage in samples.groupby("stage"):
            axes.plot(of_stage["minute"], of_stage[name], label=stage)
        axes.set(title=title, xlabel="minutes", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=80)


def _last_step(output_dir: Path) -> int:
    return int(json.loads((output_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])


if __name__ == "__main__":
    sys.exit(main())
