"""The command line: scenes and targets, processes that share scenes, and one line for every mistake."""

import configparser
import functools
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from accelerate import PartialState
from conftest import make_scene, write_tiff
from huggingface_hub import snapshot_download
from mapping_networks import export_toy_network

from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.inference import load
from hf_seg.mapping import cli
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.raster import predict_raster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a toy network."""
    return export_toy_network(tmp_path_factory.mktemp("model") / "toy")


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Return a folder of three scenes and one other file."""
    for number in range(3):
        image, _ = make_scene(np.random.default_rng(number), 80)
        write_tiff(tmp_path / "scenes" / f"s{number}.{('tif', 'TIF', 'tiff')[number]}", image)
    (tmp_path / "scenes" / "notes.txt").write_text("not a scene")
    return tmp_path / "scenes"


def run_main(*argv: object) -> int:
    """Run the command line in this process and return its exit code."""
    try:
        cli.main([str(argument) for argument in argv])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def test_a_window_too_small_for_the_network_is_one_line(
    tmp_path: Path, scenes: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(scenes / "s0.tif", tmp_path / "map.tif", "--model", model, "--window", 1) == 2
    assert "error: a window of 1 x 1 pixels is too small for the network; choose a larger" in capsys.readouterr().err


def test_one_scene_is_mapped_to_one_file_and_the_summary_is_printed(
    tmp_path: Path, scenes: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(scenes / "s0.tif", tmp_path / "out" / "map.tif", "--model", model, "--confidence") == 0
    predict_raster(model, scenes / "s0.tif", tmp_path / "other.tif", confidence=True)
    assert (tmp_path / "out" / "map.tif").read_bytes() == (tmp_path / "other.tif").read_bytes()
    printed = capsys.readouterr()
    assert f"written: {tmp_path / 'out' / 'map_confidence.tif'}" in printed.out
    assert "6,400 pixels" not in printed.out and "seam score" in printed.out and "in the networks" in printed.out
    assert "tile/s" in printed.err


@pytest.mark.parametrize("kind", ["network", "ensemble"])
def test_a_model_of_the_hub_is_pinned_by_its_revision(
    kind: str, tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`org/name@revision`, from the cache of downloads, on the command line and in Python."""
    commit, repository = 40 * "b", tmp_path / "hub" / "models--org--name"
    if kind == "network":
        shutil.copytree(model, repository / "snapshots" / commit)
    else:
        EnsembleForSemanticSegmentation.from_members([model, model]).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(load, "snapshot_download", functools.partial(snapshot_download, cache_dir=tmp_path / "hub"))
    predict_raster(model, scenes / "s0.tif", tmp_path / "expected.tif")
    for number, name in enumerate(("org/name@v1", f"org/name@{commit}")):
        assert run_main(scenes / "s0.tif", tmp_path / f"cli_{number}.tif", "--model", name) == 0
        predict_raster(name, scenes / "s0.tif", tmp_path / f"python_{number}.tif")
        for way in ("cli", "python"):
            assert np.array_equal(read(tmp_path / f"{way}_{number}.tif"), read(tmp_path / "expected.tif"))
            with rasterio.open(tmp_path / f"{way}_{number}.tif") as result:
                assert (result.tags()["model"], result.tags()["model_revision"]) == ("org/name", commit)


def test_folders_patterns_and_files_are_mapped_to_a_folder_and_existing_maps_are_skipped(
    tmp_path: Path, scenes: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiff(tmp_path / "d.tif", make_scene(np.random.default_rng(9), 70)[0])
    maps = tmp_path / "maps"
    sources = (scenes, tmp_path / "*.tif", scenes / "s0.tif")
    assert run_main(*sources, maps, "--model", model, "--preview") == 0
    ends = (".tif", ".qml", ".tif.aux.xml", "_preview.png")
    names = [f"{scene}{end}" for scene in ("d", "s0", "s1", "s2") for end in ends]
    assert sorted(path.name for path in maps.iterdir()) == sorted(names)
    before = {path: path.stat().st_mtime_ns for path in maps.iterdir()}
    for end in ends:
        (maps / f"s1{end}").unlink()
    assert run_main(*sources, maps, "--model", model, "--preview") == 0
    changed = [path.name for path in sorted(maps.iterdir()) if path.stat().st_mtime_ns != before[path]]
    assert changed == ["s1.qml", "s1.tif", "s1.tif.aux.xml", "s1_preview.png"]


def test_a_scene_that_cannot_be_mapped_does_not_stop_the_others(
    tmp_path: Path, scenes: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scenes / "s0.tif").write_bytes(b"")
    assert run_main(scenes, tmp_path / "maps", "--model", model) == 2
    names = [f"s{i}{end}" for i in (1, 2) for end in (".qml", ".tif", ".tif.aux.xml")]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: " + UNREADABLE.format(a=scenes / "s0.tif") + NOT_RECOGNIZED.format(a=scenes / "s0.tif"),
        "error: 1 of 3 scenes have no map, see above",
    ]


def in_processes(count: int, argv: list[str], folder: Path) -> str:
    """Run the command line in several forked processes connected by gloo, and return what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log.txt"

    def work(rank: int) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        PartialState._reset_state()  # inherited from the process of the test
        cli.main(argv)
        assert PartialState().num_processes == count
        torch.distributed.destroy_process_group()

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * count, log.read_text()
    return log.read_text()


def test_processes_share_the_bands_of_one_scene_and_write_the_same_bytes(tmp_path: Path, model: Path) -> None:
    image, _ = make_scene(np.random.default_rng(0), 1300)
    write_tiff(tmp_path / "a.tif", image[:, :70])
    argv = [str(tmp_path / "a.tif"), str(tmp_path / "two.tif"), "--model", str(model), "--stride", "1"]
    printed = in_processes(2, argv, tmp_path)
    assert printed.count("written: ") == 1 and printed.count("seam score") == 1
    predict_raster(model, tmp_path / "a.tif", tmp_path / "one.tif", stride=1.0)
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()


def test_processes_share_the_scenes_if_there_are_enough(tmp_path: Path, scenes: Path, model: Path) -> None:
    printed = in_processes(2, [str(scenes), str(tmp_path / "maps"), "--model", str(model)], tmp_path)
    assert printed.count("written: ") == 3
    predict_raster(model, scenes / "s1.TIF", tmp_path / "one.tif")
    with rasterio.open(tmp_path / "one.tif") as one, rasterio.open(tmp_path / "maps" / "s1.tif") as other:
        assert np.array_equal(one.read(), other.read())


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html>Sign in</html>")


def truncated(path: Path) -> None:
    write_tiff(path, np.full((50, 50), 3, np.uint8))
    path.write_bytes(path.read_bytes()[:1500])


def raster(**settings: Any) -> Callable[[Path], None]:
    """Return a function that writes a raster with this shape, type and profile."""
    shape, dtype = settings.pop("shape", (50, 50)), settings.pop("dtype", np.uint8)
    value, colors = settings.pop("value", 1), settings.pop("colors", False)

    def write(path: Path) -> None:
        write_tiff(path, np.full(shape, value, dtype), **settings)
        if colors:
            with rasterio.open(path, "r+") as file:
                file.write_colormap(1, {1: (1, 2, 3, 255)})

    return write


UNREADABLE = (
    "{a} cannot be opened as a raster; check the name, and download the file again if it is incomplete or a web page "
)
NOT_RECOGNIZED = "('{a}' not recognized as being in a supported file format.)"
BANDS = "a network takes one (SAR) or three (optical) of them"
# name: what writes {a}, arguments after {a} {b} --model {model}, message; {a}, {b}, {dir} and {model} are paths
MISTAKES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "empty file": (Path.touch, (), UNREADABLE + NOT_RECOGNIZED),
    "HTML": (html, (), UNREADABLE + NOT_RECOGNIZED),
    "folder as scene": (
        Path.mkdir,
        (),
        "{a}: no scenes found; name files, a pattern, or a folder of .tif or .tiff files",
    ),
    "missing file": (lambda path: None, (), UNREADABLE + "({a}: No such file or directory)"),
    "junk": (lambda path: path.write_bytes(b"junk" * 99), (), UNREADABLE + NOT_RECOGNIZED),
    "truncated": (
        truncated,
        (),
        "{a}: rows 0 to 49 cannot be read; the file is damaged or truncated, download it again (a.tif, band 1: "
        "IReadBlock failed at X offset 0, Y offset 0: TIFFReadEncodedStrip() failed.)",
    ),
    "complex": (
        raster(dtype=np.complex64),
        (),
        "{a} is complex (complex64); its amplitude is DERIVED_SUBDATASET:AMPLITUDE:{a}",
    ),
    "colour table": (
        raster(colors=True),
        (),
        "{a} has a colour table, so its values are not intensities; expand it with gdal_translate -expand rgb",
    ),
    "two bands": (raster(shape=(2, 50, 50)), (), "{a} has bands 1 to 2; " + BANDS + ", not 1, 2; choose with --bands"),
    "five bands": (
        raster(shape=(5, 50, 50)),
        (),
        "{a} has bands 1 to 5; " + BANDS + ", not 1, 2, 3, 4, 5; choose with --bands",
    ),
    "band 7": (raster(), ("--bands", "7"), "{a} has bands 1 to 1; " + BANDS + ", not 7; choose with --bands"),
    "two chosen": (raster(), ("--bands", "1,1"), "{a} has bands 1 to 1; " + BANDS + ", not 1, 1; choose with --bands"),
    "no band": (
        raster(),
        ("--bands", "red"),
        "argument --bands: expected band numbers, e.g. 4 3 2 or 4,3,2; got 'red'; --help lists the settings",
    ),
    "only nodata": (raster(value=0), (), "{a}: no pixel has data"),
    "only NaN": (raster(dtype=np.float32, value=np.nan), (), "{a}: no pixel has data"),
    "flat float": (
        raster(dtype=np.float32, value=5),
        (),
        "{a}: nearly every pixel is 5; if that is right, pass --stretch LOW HIGH",
    ),
    "stretch": (
        raster(),
        ("--stretch", "9", "1"),
        "stretch must be two ascending numbers, for 0 and 255; got [9.0, 1.0]",
    ),
    "stride": (raster(), ("--stride", "1.5"), "stride must be more than 0 and at most 1; it is 1.5"),
    "batch": (raster(), ("--batch_size", "0"), "batch_size must be at least 1; it is 0"),
    "abstain": (raster(), ("--abstain", "2"), "abstain must be at least 0 and at most 1; it is 2.0"),
    "window": (raster(), ("--window", "0"), "window must be at least 1; it is 0"),
    "endless window": (raster(), ("--window", "1000000000"), "window must be at most 16384; it is 1000000000"),
    "early time": (
        raster(),
        ("--stac", "--datetime", "0001-01-01T00:00:00+23:59"),
        "datetime is '0001-01-01T00:00:00+23:59'; expected ISO 8601, e.g. 2025-04-01T10:30:00Z, or begin/end of an "
        "interval",
    ),
    "unknown flag": (raster(), ("--confidense",), "unknown setting '--confidense'; did you mean '--confidence'?"),
    "tta": (
        raster(),
        ("--tta", "all"),
        "argument --tta: invalid choice: 'all' (choose from 'none', 'flips', 'd4', 'paper'); --help lists the settings",
    ),
    "disagreement": (
        raster(),
        ("--disagreement",),
        "disagreement needs an ensemble; this model is a single network",
    ),
    "polygons": (
        raster(),
        ("--polygons", "map.kml"),
        "polygons are written to a file that ends in .gpkg, .geojson, .fgb; not to 'map.kml'",
    ),
    "no model": (
        raster(),
        ("--model", "nobody/nothing"),
        "nobody/nothing was not found locally or on the Hub (Cannot find an appropriate cached snapshot folder for the "
        "specified revision on the local disk and outgoing traffic has been disabled.); check the name and the "
        "network; a private repository needs `hf auth login` or token=...",
    ),
    "model": (
        raster(),
        ("--model", "{dir}"),
        "{dir} is neither a model nor an ensemble: it has no config.json and no ensemble.json",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(
    name: str, tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write, arguments, message = MISTAKES[name]
    paths = {"a": tmp_path / "a.tif", "b": tmp_path / "b.tif", "dir": tmp_path, "model": model}
    write(paths["a"])
    capfd.readouterr()
    code = run_main(paths["a"], paths["b"], "--model", model, *(part.format(**paths) for part in arguments))
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, errors) == (2, ["error: " + message.format(**paths)])
    assert {path.name for path in tmp_path.iterdir()} <= {"a.tif"}


TARGETS = {
    "scene itself": ("a.tif", "{dir}/a.tif is the scene itself; name another file for the map"),
    "link to the scene": ("link.tif", "{dir}/link.tif is the scene itself; name another file for the map"),
    "existing map": ("old.tif", "{dir}/old.tif already exists; add --overwrite (overwrite=True), or name another file"),
    "not a GeoTIFF": ("b.png", "the map is a GeoTIFF: its name must end in .tif, not 'b.png'"),
    "in a file": (
        "old.tif/b.tif",
        "{dir}/old.tif/b.tif cannot be written (Not a directory); free disk space or choose another place",
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_an_impossible_target_is_named_and_no_file_changes(
    name: str, tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiff(tmp_path / "a.tif", np.ones((50, 50), np.uint8))
    (tmp_path / "link.tif").symlink_to(tmp_path / "a.tif")
    (tmp_path / "old.tif").write_bytes(b"an old map")
    before = (tmp_path / "a.tif").read_bytes()
    target, message = TARGETS[name]
    assert run_main(tmp_path / "a.tif", tmp_path / target, "--model", model) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: " + message.format(dir=tmp_path)]
    assert (tmp_path / "a.tif").read_bytes() == before and (tmp_path / "old.tif").read_bytes() == b"an old map"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "link.tif", "old.tif"]


def test_sources_that_cannot_be_combined_are_named(
    tmp_path: Path, scenes: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiff(tmp_path / "s0.tif", np.ones((50, 50), np.uint8))
    cases = [
        (
            (tmp_path / "*.jpg", "maps"),
            f"{tmp_path / '*.jpg'}: no scenes found; name files, a pattern, or a folder of .tif or .tiff files",
        ),
        ((scenes, "map.tif"), "3 scenes cannot be mapped to one file, map.tif; name a folder"),
        (
            (scenes / "s0.tif", tmp_path / "s0.tif", tmp_path / "maps"),
            f"{scenes / 's0.tif'} and {tmp_path / 's0.tif'} would both be mapped to {tmp_path / 'maps' / 's0.tif'}; "
            "map them in two runs",
        ),
        (
            (scenes, tmp_path / "maps", "--polygons", "x.gpkg"),
            "--polygons x.gpkg is one file for 3 scenes; name a suffix only: .gpkg",
        ),
        ((), "the following arguments are required: SOURCE, DESTINATION; --help lists the settings"),
    ]
    for arguments, message in cases:
        code = run_main(*arguments, "--model", model)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        if "polygons" in message and errors and "pyogrio" in errors[0]:
            continue  # without the extra `vector`, the error names that first
        assert (code, errors) == (2, [f"error: {message}"])


def test_overwrite_replaces_the_map(tmp_path: Path, scenes: Path, model: Path) -> None:
    (tmp_path / "old.tif").write_bytes(b"an old map")
    assert run_main(scenes / "s0.tif", tmp_path / "old.tif", "--model", model, "--overwrite") == 0
    with rasterio.open(tmp_path / "old.tif") as result:
        assert result.shape == (80, 80)


def test_the_module_can_be_run_and_the_package_installs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hf_seg.mapping.cli", run_name="__main__")
    printed = capsys.readouterr().out
    assert (
        end.value.code == 0 and "hf-seg predict scene.tif map.tif --model" in printed and "--no_zero_collar" in printed
    )
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    commands = setup["options.entry_points"]["console_scripts"].split("\n")
    assert "hf-seg = hf_seg.cli:main" in commands


def test_help_needs_no_slow_import() -> None:
    code = (
        "import sys\nfrom hf_seg.mapping import cli\ntry:\n    cli.main(['--help'])\nfinally:\n"
        "    print({'torch', 'transformers', 'accelerate', 'rasterio', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Output files:" in done.stdout and done.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    "words",
    [
        ["--bands", "4", "3", "2", "--stretch", "0", "0.4", "a.tif", "b.tif", "--model", "m", "--batch-size=9"],
        ["a.tif", "b.tif", "--model", "m", "--batch_size", "9", "--stretch", "0", "0.4", "--bands=4,3,2"],
        ["--model", "m", "--bands", "4,3,2", "a.tif", "b.tif", "--stretch", "0", "0.4", "--batch-size", "9"],
    ],
)
def test_bands_and_stretch_may_come_before_the_scenes_and_hyphens_are_underscores(words: list[str]) -> None:
    args, options = cli.parse(words)
    assert (args.sources, args.destination, args.model, options.tta) == (["a.tif"], "b.tif", "m", "none")
    assert options == RasterOptions(bands=[4, 3, 2], stretch=[0.0, 0.4], batch_size=9)


def test_switches_take_no_value_from_what_follows() -> None:
    args, options = cli.parse(["--model", "m", "--no-zero-collar", "--confidence", "a.tif", "b.tif", "--preview"])
    assert args.sources == ["a.tif"] and options == RasterOptions(zero_collar=False, confidence=True, preview=True)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (("{long}.tif", "{dir}/map.tif"), "{long}.tif cannot be read (File name too long)"),
        (("{scene}", "{long}.tif"), "{long}.tif cannot be written (File name too long)"),
        (
            ("{scene}", "{dir}/map.tif", "--polygons", "{scene}/map.gpkg"),
            "{scene}/map.gpkg cannot be written (File exists); free disk space or choose another place; the same "
            "command resumes from the bands in {dir}/.map.tif.partial",
        ),
    ],
)
def test_a_path_that_the_file_system_refuses_is_named_in_one_line(
    arguments: tuple[str, ...],
    refused: str,
    tmp_path: Path,
    scenes: Path,
    model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "--polygons" in arguments:
        pytest.importorskip("pyogrio")
    paths = {"long": tmp_path / ("x" * 300), "scene": scenes / "s0.tif", "dir": tmp_path}
    assert run_main(*(argument.format(**paths) for argument in arguments), "--model", model) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {refused.format(**paths)}"]
    assert not (tmp_path / "map.tif").exists()


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(argv: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    assert run_main() == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes from the last finished band\n"
