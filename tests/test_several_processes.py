"""Runs that lose a process, or go on with another number of processes or on SLURM, keep the order of their images."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from recipe_process import run_recipe
from test_stage2 import _save_plain_segformer, command_line, read_log

PROJECT = Path(__file__).parents[1]
SLURM = PROJECT / "recipes" / "slurm"


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run) if "loss" in line]


def run_and_resume(
    oem_sar: Path, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], kill: str
) -> tuple[Path, Path]:
    """Kill a process or all of them at step 6, after the checkpoint of step 3, and resume with other processes.

    Args:
        before, after: processes, and micro-batches of a step; a step has four images.
        kill: what kills.

    Returns:
        The run, and one of a single process that nothing disturbed.
    """
    settings = {"model_name_or_path": _save_plain_segformer(tmp_path), "lovasz_weight": 0, "eval_steps": 0}

    def argv(name: str, processes: int, accumulation: int) -> list[str]:
        spread = {"per_device_train_batch_size": 4 // processes // accumulation}
        spread["gradient_accumulation_steps"] = accumulation
        return command_line(oem_sar, tmp_path / name, **settings, **spread)

    frozen = {"disturb": "freeze_batch_norm"}
    whole = run_recipe("stage2", *argv("whole", 1, 1), log=tmp_path / "log_whole", **frozen)
    assert whole.exit_codes == [0], whole.output
    killed = run_recipe(
        "stage2",
        *argv("run", *before),
        log=tmp_path / "log_killed",
        processes=before[0],
        disturb=f"freeze_batch_norm+{kill}_before_step:6",
    )
    assert all(code != 0 for code in killed.exit_codes)
    resume = [*argv("run", *after), "--resume_from_checkpoint", "latest"]
    resumed = run_recipe("stage2", *resume, log=tmp_path / "log", processes=after[0], **frozen)
    assert resumed.exit_codes == [0] * after[0], resumed.output
    assert "resumed from step_00000003: steps 3 to 8, 4 of 6 images a step" in resumed.output
    return tmp_path / "run", tmp_path / "whole"


def test_a_run_of_two_processes_goes_on_with_one(oem_sar: Path, tmp_path: Path) -> None:
    run, whole = run_and_resume(oem_sar, tmp_path, (2, 1), (1, 2), "kill")
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-5)
    argv = command_line(oem_sar, run, model_name_or_path=tmp_path / "plain", lovasz_weight=0, eval_steps=0)
    refused = run_recipe("stage2", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / "log_refused")
    assert refused.exit_codes == [2] and refused.output.count("error: ") == 1
    assert "is of a run with 4 images a step; per_device_train_batch_size 2, gradient_accumulation_steps 1 and 1" in (
        refused.output
    )
    assert "choose them so that their product is 4" in refused.output


def test_the_score_is_that_of_the_exported_statistics(oem_sar: Path, tmp_path: Path) -> None:
    settings = {"max_train_steps": 2, "eval_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 1}
    argv = [*command_line(oem_sar, tmp_path / "run", **settings), "--resume_from_checkpoint", "latest"]
    scores = []
    for name in ("first", "again"):  # the second one only scores and exports
        result = run_recipe("stage2", *argv, log=tmp_path / name, processes=2)
        assert result.exit_codes == [0, 0], result.output
        scores.append((tmp_path / "run" / "eval_results.json").read_text())
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (4, 1)), ((1, 2), (2, 2)), ((4, 1), (2, 1))])
def test_a_run_goes_on_with_other_processes(
    before: tuple[int, int], after: tuple[int, int], oem_sar: Path, tmp_path: Path
) -> None:
    run, whole = run_and_resume(oem_sar, tmp_path, before, after, "kill_last_rank")
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-5)


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def processes_with(word: str) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if word in " ".join(each.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_killed_rank_ends_the_launcher_and_the_other_rank(oem_sar: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = {"max_train_steps": 20_000, "eval_steps": 0, "dataloader_num_workers": 1}
    words = [sys.executable, "-m", "hf_seg.cli", "stage2", "--nproc", "2", *command_line(oem_sar, run, **long)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    wait_for(lambda: list(run.glob("checkpoints/step_*")) or launcher.poll() is not None)
    ranks = [each for each in psutil.Process(launcher.pid).children() if str(run) in " ".join(each.cmdline())]
    assert len(ranks) == 2, (tmp_path / "log").read_text()
    ranks[1].kill()
    assert launcher.wait(60) == 2
    assert "was ended by SIGKILL" in (tmp_path / "log").read_text()
    wait_for(lambda: not processes_with(str(run)), 20)
    step = int(sorted(run.glob("checkpoints/step_*"))[-1].name.removeprefix("step_"))
    argv = command_line(oem_sar, run, max_train_steps=step + 1, eval_steps=0, per_device_train_batch_size=4)
    resumed = run_recipe("stage2", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / "log_resumed")
    assert resumed.exit_codes == [0] and f"resumed from step_{step:08d}" in resumed.output, resumed.output


FAKE_SRUN = """#!/bin/bash
# Runs a command on as many nodes as the job has, all of them here.
while [[ $1 == --* ]]; do shift; done
pids=(); trap 'kill -TERM "${pids[@]}"' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; one=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done
    if [ "$one" -ne 0 ]; then code=$one; fi
done
exit "$code"
"""
FAKE_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$FAKE_SLURM/requeued"; fi
"""


@pytest.mark.parametrize("name", ["train", "map"])
def test_a_job_script_is_valid_bash(name: str) -> None:
    checked = subprocess.run(["bash", "-n", SLURM / f"{name}.sbatch"], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    settings = [line for line in (SLURM / f"{name}.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in settings and "#SBATCH --open-mode=append" in settings


def start_job(folder: Path, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the job script as SLURM would, on two nodes of one process each."""
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "FAKE_SLURM": str(folder), "MASTER_PORT": str(port)}
    environment["PATH"] = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "here", "NPROC_PER_NODE": "1"}
    with log.open("wb") as output:
        command = ["bash", SLURM / "train.sbatch", *arguments]
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)


@pytest.mark.slow
def test_a_job_on_two_nodes_requeues_itself_at_sigterm_and_resumes(oem_sar: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    argv = command_line(oem_sar, run, max_train_steps=20_000, eval_steps=0)
    job = start_job(tmp_path, ["stage2", *argv], log)
    wait_for(lambda: list(run.glob("checkpoints/step_*")) or job.poll() is not None)
    job.send_signal(signal.SIGTERM)
    assert job.wait(90) != 0
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", log.read_text()
    assert "SIGTERM: saved" in log.read_text() and "on 2 process(es)" in log.read_text()
    wait_for(lambda: not processes_with(str(run)), 30)
    step = int(sorted(run.glob("checkpoints/step_*"))[-1].name.removeprefix("step_"))
    argv = command_line(oem_sar, run, max_train_steps=step + 2, eval_steps=0)
    job = start_job(tmp_path, ["stage2", *argv], tmp_path / "log2")
    assert job.wait(180) == 0, (tmp_path / "log2").read_text()
    assert f"resumed from step_{step:08d}" in (tmp_path / "log2").read_text()
    assert (run / "model.safetensors").exists() and (tmp_path / "requeued").read_text().count("\n") == 1
