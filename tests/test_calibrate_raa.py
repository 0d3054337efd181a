import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import write_tiff
from PIL import Image

from hf_seg.arguments import Stage1Arguments
from hf_seg.data.transforms import align_resolution
from hf_seg.errors import UserError
from hf_seg.studies import power_spectra, raa_calibration
from hf_seg.studies.power_spectra import N_RINGS, PATCH, RATIOS, RING_EDGES, Mixture, Spectra
from hf_seg.synthetic import SOURCE_FOLDER, TARGET_FOLDER, make_synthetic_dataset

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SCRIPT = Path(__file__).parents[1] / "scripts/calibrate_raa.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibrate_raa", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("raa") / "synthetic"
    make_synthetic_dataset(output=output, seed=7, source=24, train=8, val=1, size=256, test=0, num_workers=1)
    return output


@pytest.fixture(scope="module")
def tiles(synthetic: Path) -> list[np.ndarray]:
    """Sharp optical tiles, (H, W, 3) uint8."""
    return [raa_calibration.read_optical(path) for path in raa_calibration.find_images(synthetic / SOURCE_FOLDER)]


@pytest.fixture(scope="module")
def curves(tiles: list[np.ndarray]) -> np.ndarray:
    """Spectra of every second tile at every ratio."""
    return power_spectra.reference_curves(measure(tiles[::2], aligned=True))


def measure(images: list[np.ndarray], *, aligned: bool = False) -> Spectra:
    function = power_spectra.measure_aligned if aligned else power_spectra.measure
    pairs = ((raa_calibration.luminance(image), power_spectra.choose_patches(image)) for image in images)
    return power_spectra.stack([function(grey, windows) for grey, windows in pairs if windows])


def blur(images: list[np.ndarray], low: float, high: float, share: float = 1.0) -> list[np.ndarray]:
    """Align the first `share` of the images by ratios spread evenly between two."""
    count = round(share * len(images))
    ratios = low + (high - low) * (np.random.default_rng(0).permutation(count) + 0.5) / count
    aligned = [align_resolution(image, ratio) for image, ratio in zip(images[:count], ratios, strict=True)]
    return aligned + images[count:]


def add_noise(images: list[np.ndarray], levels: float) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    noisy = (image + levels * rng.standard_normal(image.shape) for image in images)
    return [np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in noisy]


def estimate(images: list[np.ndarray], curves: np.ndarray) -> Mixture:
    return power_spectra.fit_mixture(power_spectra.ratio_costs(measure(images), curves))


def save(images: list[np.ndarray], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


def calibrate(script: ModuleType, *arguments: object) -> None:
    script.main([*map(str, arguments)])


# Spectra


def test_white_noise_has_its_variance_in_every_ring() -> None:
    noise = 5 * np.random.default_rng(0).standard_normal((200, PATCH, PATCH)) + 100
    assert power_spectra.power_spectrum(noise).mean(0) == pytest.approx(np.full(N_RINGS, 25), rel=0.1)


@pytest.mark.parametrize("side", [PATCH, 200])
@pytest.mark.parametrize("ring", [3, 9, 17])
def test_the_power_of_a_wave_lies_in_the_ring_of_its_frequency(side: int, ring: int) -> None:
    frequency = RING_EDGES[ring : ring + 2].mean()
    y, x = np.mgrid[:side, :side] * np.sqrt(0.5)  # along the diagonal, where frequencies reach 0.7
    power = power_spectra.power_spectrum(np.cos(2 * np.pi * frequency * (x + y)))
    assert power.argmax() == ring


def test_the_noise_of_an_image_is_measured_below_its_texture(tiles: list[np.ndarray]) -> None:
    before, after = (np.median(measure(images).noise) for images in (tiles, add_noise(tiles, 6)))
    # luminance of three independent bands
    assert after - before == pytest.approx(36 * (0.299**2 + 0.587**2 + 0.114**2), rel=0.15)


def test_clipped_ground_does_not_hide_the_noise() -> None:
    noise = 120 + 5 * np.random.default_rng(0).standard_normal((4, PATCH, PATCH))
    noise[:2] = 255
    assert power_spectra.noise_power(noise.astype(np.float32)) == pytest.approx(25, rel=0.2)


def test_patches_contain_neither_nodata_nor_flat_ground() -> None:
    image = np.random.default_rng(0).integers(1, 255, (2 * PATCH, 3 * PATCH, 3), dtype=np.uint8)
    image[:, :PATCH] = 0
    image[:PATCH, PATCH:] = 90
    starts = {(at[0].start, at[1].start) for at in power_spectra.choose_patches(image)}
    assert starts == {(PATCH // 2, PATCH), (PATCH // 2, 2 * PATCH), (PATCH, PATCH), (PATCH, 2 * PATCH)}
    assert not power_spectra.choose_patches(image[: PATCH - 1])
    assert len(power_spectra.choose_patches(image[-PATCH:, -PATCH:])) == 1


# The blur between two domains


@pytest.mark.parametrize(("low", "high", "share"), [(0.1, 0.35, 1.0), (0.15, 0.25, 0.5), (0.25, 0.4, 0.75)])
def test_known_ratios_and_their_share_are_recovered(
    tiles: list[np.ndarray], curves: np.ndarray, low: float, high: float, share: float
) -> None:
    found = estimate(blur(tiles[1::2], low, high, share), curves)
    assert found.prob == pytest.approx(share, abs=0.1)
    assert found.min_ratio == pytest.approx(low, rel=0.2)
    assert found.max_ratio == pytest.approx(high, rel=0.2)


def test_the_smallest_ratio_of_weak_blur_is_recovered(tiles: list[np.ndarray], curves: np.ndarray) -> None:
    found = estimate(blur(tiles[1::2], 0.35, 0.7, 0.75), curves)
    assert found.prob > 0.4
    assert found.min_ratio == pytest.approx(0.35, rel=0.3)
    assert found.max_ratio > 0.5


def test_contrast_and_brightness_do_not_matter(tiles: list[np.ndarray], curves: np.ndarray) -> None:
    blurred = blur(tiles[1::2], 0.1, 0.35, 0.75)
    dull = [np.rint(0.6 * image + 30).astype(np.uint8) for image in blurred]
    assert estimate(dull, curves) == pytest.approx(estimate(blurred, curves), rel=0.15)


def test_noise_is_not_mistaken_for_sharpness(tiles: list[np.ndarray], curves: np.ndarray) -> None:
    found = estimate(add_noise(blur(tiles[1::2], 0.12, 0.3), 4), curves)
    assert found.prob >= 0.9
    assert found.min_ratio == pytest.approx(0.12, rel=0.25)
    assert found.max_ratio == pytest.approx(0.3, rel=0.25)


def test_a_cleaner_camera_is_not_mistaken_for_a_blurry_one(tiles: list[np.ndarray]) -> None:
    noisy = power_spectra.reference_curves(measure(add_noise(tiles[::2], 4), aligned=True))
    assert estimate(tiles[1::2], noisy).prob == 0


def test_a_domain_is_not_blurred_against_itself(tiles: list[np.ndarray], curves: np.ndarray) -> None:
    assert estimate(tiles[1::2], curves).prob == 0
    assert estimate(add_noise(tiles[1::2], 4), curves).prob == 0


def test_stronger_blur_of_another_kind_means_smaller_ratios(tiles: list[np.ndarray], curves: np.ndarray) -> None:
    medians = []
    for sigma in (1.2, 2.0, 3.5):
        images = [cv2.GaussianBlur(tile, (0, 0), sigma) for tile in tiles[1::2]]
        best = power_spectra.ratio_costs(measure(images), curves).argmin(1)
        medians.append(float(np.median(RATIOS[best])))
    # two bilinear resamplings by r have the variance of a Gaussian of about 0.4 / r pixels
    assert medians == pytest.approx([0.4 / 1.2, 0.4 / 2.0, 0.4 / 3.5], rel=0.2)


def test_a_mixture_has_its_share_of_sharp_images_and_the_rest_uniform() -> None:
    weights = Mixture(0.6, 0.5, 0.8).weights()
    inside = (RATIOS > 0.49) & (RATIOS < 0.81)
    assert weights.sum() == pytest.approx(1)
    assert weights[-1] == pytest.approx(0.4)
    assert (weights[~inside][:-1] == 0).all()
    assert (RATIOS @ weights - 0.4) / 0.6 == pytest.approx(0.65, rel=0.03)


def test_spectra_match_after_the_true_alignment_only(tiles: list[np.ndarray]) -> None:
    source = measure(tiles[::2], aligned=True)
    target = power_spectra.image_bands(measure(blur(tiles[1::2], 0.2, 0.4, 0.5)))
    mixtures = (Mixture(0.5, 0.21, 0.4), Mixture(0.0, 0.2, 0.4), Mixture(0.5, 0.1, 0.2), Mixture(1.0, 0.2, 0.4))
    apart = [power_spectra.mismatch(target, power_spectra.mixture_bands(source, one)) for one in mixtures]
    assert apart[0] < 1.3
    assert min(apart[1:]) > 1.5 * apart[0]


def test_known_ratios_are_recovered_on_real_tiles(realdata: Path) -> None:
    images = [
        raa_calibration.read_optical(path) for path in raa_calibration.find_images(realdata / "OpenEarthMap_wo_xBD")
    ]
    images = [image[:512, :512] for image in images if power_spectra.choose_patches(image[:512, :512])]
    curves = power_spectra.reference_curves(measure(images[::2], aligned=True))
    found = estimate(blur(images[1::2], 0.1, 0.35), curves)
    assert found == pytest.approx((1.0, 0.1, 0.35), rel=0.25)


# The script


def test_the_proposal_is_printed_as_stage_1_settings_with_reasons(
    script: ModuleType,
    tiles: list[np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = save(tiles[:10], tmp_path / "source"), save(blur(tiles[10:], 0.12, 0.3), tmp_path / "target")
    calibrate(script, source, target, "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    settings = yaml.safe_load("\n".join(line for line in printed.splitlines() if re.match(r"raa_\w+: ", line)))
    assert settings["raa_prob"] == 0.8 and "limited to 0.8" in printed
    assert settings["raa_min_scale"] == pytest.approx(0.12, rel=0.2)
    assert settings["raa_max_scale"] == pytest.approx(0.3, rel=0.2)
    Stage1Arguments(**settings)
    report: dict[str, Any] = json.loads((tmp_path / "out/raa.json").read_text())
    assert {key: report[key] for key in settings} == settings
    assert report["mismatch_db"]["after"] < report["mismatch_db"]["before"] / 2
    assert list(report["ratios"]) == [f"{index:03d}.png" for index in range(14)]
    assert report["n_images"] == {"source": 10, "target": 14}
    assert "source has only 10 usable images" in printed
    for name in ("raa.json", "spectra.png", "examples.png"):
        assert str(tmp_path / "out" / name) in printed
    assert min(Image.open(tmp_path / "out/examples.png").size) > 1000


def test_a_sharper_target_gets_no_alignment_but_a_reason_and_runs_are_deterministic(
    script: ModuleType,
    tiles: list[np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = save(blur(tiles[:10], 0.4, 0.5), tmp_path / "source"), save(tiles[10:20], tmp_path / "target")
    for output in (tmp_path / "out", tmp_path / "again"):
        calibrate(script, source, target, "--output", output, "--max_images", 6)
    printed = capsys.readouterr().out
    assert "raa_prob: 0.00\n" in printed and "raa_min_scale" not in printed
    assert "sharper than the source" in printed and "Swap the folders" in printed
    report = json.loads((tmp_path / "out/raa.json").read_text())
    assert report["raa_min_scale"] is None
    assert report["sharpness_db"]["target"] > report["sharpness_db"]["source"] + 1.5
    assert report["n_images"] == {"source": 6, "target": 6}
    for name in ("raa.json", "spectra.png", "examples.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_synthetic_target_has_less_fine_detail_than_its_source(synthetic: Path) -> None:
    source, target = (
        raa_calibration.measure_folder(synthetic / name, 24, aligned=False) for name in (SOURCE_FOLDER, TARGET_FOLDER)
    )
    assert target.sharpness_db < source.sharpness_db - 1  # its camera zooms by 0.42 to 0.85


def test_a_noisier_target_is_named(tiles: list[np.ndarray], tmp_path: Path) -> None:
    quiet, noisy = save(tiles[:3], tmp_path / "quiet"), save(add_noise(tiles[:3], 9), tmp_path / "noisy")
    sets = [raa_calibration.measure_folder(folder, 3, aligned=False) for folder in (quiet, noisy)]
    assert any("target is noisier" in line for line in raa_calibration.cautions(*sets))
    assert not any("target is noisier" in line for line in raa_calibration.cautions(*reversed(sets)))


def test_only_the_optical_images_of_the_datasets_are_taken(synthetic: Path) -> None:
    assert {path.parent.name for path in raa_calibration.find_images(synthetic / SOURCE_FOLDER)} == {"images"}
    files = raa_calibration.find_images(synthetic / TARGET_FOLDER)
    assert len(files) == 8
    assert {path.parent for path in files} == {synthetic / TARGET_FOLDER / "train/rgb_images"}
    assert raa_calibration.find_images(synthetic / TARGET_FOLDER / "train/rgb_images") == files


def test_images_are_found_below_and_chosen_evenly(tiles: list[np.ndarray], tmp_path: Path) -> None:
    for index, suffix in enumerate((".png", ".jpg", ".TIF", ".jpeg", ".png")):
        path = tmp_path / f"region_{index}" / f"tile{suffix}"
        path.parent.mkdir()
        Image.fromarray(tiles[index][:PATCH, :PATCH]).save(path)
    (tmp_path / "region_0/._tile.png").write_bytes(b"")
    (tmp_path / "region_0/notes.txt").write_text("")
    assert len(raa_calibration.find_images(tmp_path)) == 5
    chosen = raa_calibration.measure_folder(tmp_path, 3, aligned=False).files
    assert [path.parent.name for path in chosen] == ["region_0", "region_2", "region_4"]


def test_mistakes_name_the_file_and_how_to_fix_it(script: ModuleType, tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(1, 255, (3, 160, 160), dtype=np.uint8)
    with pytest.raises(UserError, match="--max_images must be at least 1; it is 0"):
        calibrate(script, tmp_path, tmp_path, "--output", tmp_path / "out", "--max_images", 0)
    with pytest.raises(UserError, match=r"nowhere: no folder with images in it or below; looked for"):
        raa_calibration.find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no folder with images in it or below; looked for \.tif"):
        raa_calibration.find_images(tmp_path / "empty")
    (tmp_path / "truncated.tif").write_bytes(b"II*\0 and no more")
    with pytest.raises(UserError, match=r"truncated\.tif: cannot be read as an image .*; remove it"):
        raa_calibration.read_optical(tmp_path / "truncated.tif")
    write_tiff(tmp_path / "deep.tif", tile.astype(np.uint16))
    with pytest.raises(UserError, match=r"deep\.tif: expected 3 bands of uint8, found 3 of uint16"):
        raa_calibration.read_optical(tmp_path / "deep.tif")
    write_tiff(tmp_path / "sar.tif", tile[0])
    with pytest.raises(UserError, match=r"sar\.tif: .* found 1 of uint8; pass a folder of optical images"):
        raa_calibration.read_optical(tmp_path / "sar.tif")
    write_tiff(tmp_path / "small/a.tif", tile[:, :100])
    with pytest.raises(UserError, match=r"no image shows 128 x 128 pixels .*; a\.tif is 100 x 160"):
        raa_calibration.measure_folder(tmp_path / "small", 5, aligned=False)


def test_without_an_output_folder_the_proposal_is_only_printed(
    script: ModuleType,
    tiles: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save(tiles[:3], tmp_path / "images")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    calibrate(script, folder, folder, "--max-images", 2)
    assert capsys.readouterr().out.endswith("\nraa_prob: 0.00\n")
    assert list((tmp_path / "empty").iterdir()) == []


def test_other_files_in_the_output_folder_stay(script: ModuleType, tiles: list[np.ndarray], tmp_path: Path) -> None:
    folder, output = save(tiles[:3], tmp_path / "images"), tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "raa.json").write_text("older")
    calibrate(script, folder, folder, "--output", output)
    assert sorted(path.name for path in output.iterdir()) == ["examples.png", "notes.txt", "raa.json", "spectra.png"]
    assert json.loads((output / "raa.json").read_text())["raa_prob"] == 0
    with pytest.raises(UserError, match=r"--output .*notes\.txt is not a folder"):
        calibrate(script, folder, folder, "--output", output / "notes.txt")


def test_help_needs_no_slow_import() -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    code += "finally: print({'torch', 'albumentations', 'datasets', 'rasterio'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0 and "--max_images" in found.stdout and found.stdout.endswith("\nset()\n")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path), "--output", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    suffixes = ".tif, .tiff, .png, .jpg, .jpeg"
    message = f"error: {tmp_path}: no folder with images in it or below; looked for {suffixes}\n"
    assert (run.returncode, run.stderr) == (2, message)
    assert not (tmp_path / "out").exists()
