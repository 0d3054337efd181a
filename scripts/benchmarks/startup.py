"""How long a fresh process takes: to import, to help, to its first training step, to its first map."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Figure, Result
from benchmarks.prediction import save_model, write_scene

from hf_seg.synthetic import TARGET_FOLDER, make_synthetic_dataset


def _run(*words: str) -> float:
    """Return the seconds that a fresh Python takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


def _until(file: Path, *words: str) -> float:
    """Return the seconds until a fresh Python has written something to a file."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.wait():
        raise RuntimeError(f"{' '.join(words)} failed")
    return seconds


def startup(size: int, repeats: int) -> list[Result]:
    """Fresh processes; the import is compared with an empty one, the rest has no peer."""
    repeats = min(repeats, 3)
    command = ("-m", "hf_seg.cli")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = str(save_model("toy-segformer", folder / "model", size // 4))
        scene = str(write_scene(folder / "scene.tif", size // 2))
        data = str(make_synthetic_dataset(folder / "data", source=2, train=4, val=1, test=1, size=128) / TARGET_FOLDER)
        toy = ("--config", "toy/stage2_segformer.yaml")
        toy += ("--max_train_steps", "1", "--warmup_steps", "0", "--eval_steps", "0")
        imports, empty, helps, steps, maps = [], [], [], [], []
        for number in range(repeats):
            run = folder / f"run{number}"
            empty.append(_run("-c", "pass"))
            imports.append(_run("-c", "import hf_seg"))
            helps.append(_run(*command, "stage2", "--help"))
            steps.append(_until(
                run / "metrics.jsonl", *command, "stage2", *toy, "--data_dir", data, "--output_dir", str(run)
            ))  # fmt: skip
            maps.append(_run(*command, "predict", scene, str(folder / f"{number}.tif"), "--model", model))
    return [
        Result("import hf_seg", Figure.of(imports), {"empty Python": Figure.of(empty)}, "0.1 s more"),
        Result("hf-seg stage2 --help", Figure.of(helps), {}, "2 s"),
        Result("first training step, toy", Figure.of(steps), {}, "10 s"),
        Result("first map, toy", Figure.of(maps), {}, "5 s"),
    ]
