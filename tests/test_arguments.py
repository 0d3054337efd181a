"""Settings: what YAML and command line may say, who wins, and what is answered to a mistake."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_seg.arguments import (
    EnsembleArguments,
    HubSettings,
    PseudoLabelArguments,
    RecipeArguments,
    Stage1Arguments,
    Stage2Arguments,
    check_same_recipe,
    dump_recipe,
    write_recipe,
)
from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import answer_help, parse_arguments

CONFIGS = Path(__file__).parents[1] / "recipes/configs"
STAGE2_CONFIGS = sorted([*CONFIGS.glob("stage2/*.yaml"), *CONFIGS.glob("toy/stage2*.yaml")])
STAGE1_CONFIGS = sorted([*CONFIGS.glob("stage1/*.yaml"), *CONFIGS.glob("toy/stage1*.yaml")])
RECIPES = [(Stage1Arguments, path) for path in STAGE1_CONFIGS] + [(Stage2Arguments, path) for path in STAGE2_CONFIGS]
# Where things lie and how one launch goes; a step count, although it may change on resume, makes the result.
WHERE_AND_WHEN = {"config", "data_dir", "label_set", "output_dir", "pseudo_labels", "resume_from_checkpoint"}
SETTINGS = (Stage1Arguments, Stage2Arguments, PseudoLabelArguments, EnsembleArguments)
FREE_ON_RESUME = {field.name for each in SETTINGS for field in dataclasses.fields(each) if field.metadata["free"]}
HUB_SETTINGS = {field.name for field in dataclasses.fields(HubSettings)} - {"config"}
MAY_BE_ABSENT = WHERE_AND_WHEN | (FREE_ON_RESUME - {"max_train_steps"})

Parse = Callable[..., Stage2Arguments]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """Parse a YAML text, and then a command line."""

    def parse(text: str, *argv: str) -> Stage2Arguments:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_arguments(Stage2Arguments, ["--config", str(path), *argv])

    return parse


def test_no_arguments_give_the_headline_recipe() -> None:
    args = parse_arguments(Stage2Arguments, [])
    assert args == Stage2Arguments()
    assert (args.model_name_or_path, args.crop_size, args.max_train_steps) == ("nvidia/mit-b5", 896, 160_000)
    assert (args.ce_weight, args.rce_weight, args.lovasz_weight, args.rce_epsilon) == (1, 1, 1, 1e-4)


def test_yaml_sets_and_the_command_line_overrides(parse: Parse) -> None:
    text = "learning_rate: 1.0e-3\nseed: 7\nfrom_scratch: true\nreport_to: none\n"
    args = parse(text, "--seed", "8", "--from_scratch", "false", "--crop-size", "64")
    assert (args.learning_rate, args.seed, args.from_scratch, args.crop_size) == (1e-3, 8, False, 64)
    assert args.report_to == "none"
    assert args.weight_decay == Stage2Arguments().weight_decay


def test_the_order_of_config_and_overrides_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("seed: 7\ncrop_size: 64")
    before = parse_arguments(Stage2Arguments, ["--seed", "8", "--config", str(path)])
    assert before == parse_arguments(Stage2Arguments, ["--config", str(path), "--seed", "8"])
    assert (before.seed, before.crop_size) == (8, 64)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 6e-5", "learning_rate", 6e-5),
        ("learning_rate: +6E-05", "learning_rate", 6e-5),
        ("learning_rate: .5e-3", "learning_rate", 5e-4),
        ("learning_rate: 1.e-3", "learning_rate", 1e-3),
        ("weight_decay: 0", "weight_decay", 0.0),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("output_dir: off", "output_dir", "off"),
        ("output_dir: yes", "output_dir", "yes"),
        ("output_dir: läufe/größe", "output_dir", "läufe/größe"),
        ("from_scratch: True", "from_scratch", True),
        ("pseudo_labels: null", "pseudo_labels", None),
        ("resume_from_checkpoint:", "resume_from_checkpoint", None),
        ("max_train_steps: 160_000", "max_train_steps", 160_000),
        ("", "seed", 0),
        ("# only a comment", "seed", 0),
    ],
)
def test_yaml_means_what_it_looks_like(parse: Parse, text: str, key: str, value: object) -> None:
    found = getattr(parse(text), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ("learning-rate: 1", "unknown setting 'learning-rate'; did you mean 'learning_rate'?"),
        ("zzzzzz: 1", r"unknown setting 'zzzzzz'$"),
        ("3: 1", r"unknown setting 3$"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("seed: 1\nseed: 2", "duplicate key 'seed'"),
        ("crop_size: big", "crop_size must be of type int; it is 'big' \\(str\\)"),
        ("crop_size: 64.0", "crop_size must be of type int; it is 64.0 \\(float\\)"),
        ("seed: true", "seed must be of type int; it is True \\(bool\\)"),
        ("learning_rate: true", "learning_rate must be of type float; it is True"),
        ("learning_rate: fast", "learning_rate must be of type float; it is 'fast'"),
        ("learning_rate: null", "learning_rate must be of type float; it is None"),
        ("from_scratch: 1", "from_scratch must be of type bool; it is 1 \\(int\\)"),
        ("from_scratch: yes", "from_scratch must be of type bool; it is 'yes' \\(str\\)"),
        ("data_dir: [a, b]", "data_dir must be of type str; it is \\['a', 'b'\\]"),
        ("pseudo_labels: 3", "pseudo_labels must be of type str | None; it is 3"),
        ("mixed_precision: fp8", "mixed_precision must be one of \\('no', 'bf16', 'fp16'\\); it is 'fp8'"),
        ("mixed_precision: false", "mixed_precision must be one of .*; it is False"),
        ("- seed", "`key: value`; found a list"),
        ("[]", "`key: value`; found a list"),
        ("0", "`key: value`; found a int"),
        ("just words", "`key: value`; found a str"),
        ("seed: [1", "line 1"),
        ("seed: 1\n  crop_size: 2", "line 2"),
        ("? [a]\n: 1", "unhashable"),
        ("seed: !!python/object:os.system 1", "could not determine a constructor"),
    ],
)
def test_a_wrong_yaml_is_one_line_naming_file_and_reason(parse: Parse, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse(text)
    assert "settings.yaml: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown setting '--lerning_rate'; did you mean '--learning_rate'?"),
        (["--lerning-rate=1"], "did you mean '--learning_rate'?"),
        (["--learn", "1"], "unknown setting '--learn'"),  # no abbreviations: they would change as settings are added
        (["settings.yaml"], "unknown setting 'settings.yaml'"),
        (["--learning_rate", "fast"], "learning_rate.*'fast'"),
        (["--max_train_steps", "1e3"], "max_train_steps.*'1e3'"),
        (["--from_scratch", "perhaps"], "from_scratch.*perhaps"),
        (["--mixed_precision", "fp8"], "mixed_precision.*'fp8'"),
        (["--seed"], "seed.*expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_error_naming_the_setting(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(Stage2Arguments, argv)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": 100}, "crop_size must be a multiple of 32; it is 100"),
        ({"crop_size": 0}, "crop_size must be at least 32; it is 0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0 and at most 1e\\+06; it is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be .*; it is nan"),
        ({"jitter_prob": 1.5}, "jitter_prob must be at least 0 and at most 1; it is 1.5"),
        ({"speckle_prob": -0.1}, "speckle_prob must be at least 0"),
        ({"eval_stride": 0.0}, "eval_stride must be more than 0 and at most 1; it is 0.0"),
        ({"max_class_share": 0.0}, "max_class_share must be more than 0"),
        ({"rce_epsilon": 0.0}, "rce_epsilon must be more than 0"),
        ({"ce_weight": -1.0}, "ce_weight must be at least 0"),
        ({"ce_weight": 0.0, "rce_weight": 0.0, "lovasz_weight": 0.0}, "ce_weight must be above 0 if no other is"),
        ({"max_scale": 0.4}, "max_scale must be at least min_scale, 0.5; it is 0.4"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
        ({"max_train_steps": 1500}, "warmup_steps must be below max_train_steps, 1500; it is 1500"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1"),
        ({"logging_steps": 0}, "logging_steps must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**32}, "seed must be at least 0 and at most"),  # numpy's global generator takes 32 bits
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stage2Arguments(**values)  # type: ignore[arg-type]


def test_the_ends_of_a_range_are_allowed() -> None:
    ends = {"jitter_prob": 1.0, "speckle_prob": 0.0, "eval_stride": 1.0, "eval_steps": 0, "checkpointing_steps": 0}
    args = Stage2Arguments(crop_size=32, warmup_steps=0, max_train_steps=1, min_scale=1.0, max_scale=1.0, **ends)  # type: ignore[arg-type]
    assert {key: getattr(args, key) for key in ends} == ends


def test_a_range_is_checked_for_values_from_yaml_too(parse: Parse) -> None:
    with pytest.raises(UserError, match="crop_size must be a multiple of 32; it is 100"):
        parse("crop_size: 100")
    assert parse("crop_size: 100", "--crop_size", "96").crop_size == 96


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: cannot be read as settings"):
        parse_arguments(Stage2Arguments, ["--config", str(path)])


BOMB = "[&x0 [lol]" + "".join(f", &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10)) + "]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"seed: {BOMB}", "seed must be of type int; it is [['lol'], "),
        (BOMB, "settings are lines of `key: value`; found a list"),
        (f"seed: {'[' * 10_000}", "cannot be read as settings: too many lists or mappings in each other"),
        (f"seed: {'9' * 5000}", "cannot be read as settings: Exceeds the limit"),
        (f"seed: 0x{'f' * 6000}", "seed must be at least 0 and at most 2.14748e+09; it is a number of 24000 bits"),
        (f"learning_rate: 0x{'f' * 6000}", "learning_rate must be a finite number; it is a number of 24000 bits"),
        ("weight_decay: .inf", "weight_decay must be a finite number; it is inf"),
        ('data_dir: "a\\0b"', r"data_dir must be text without NUL; it is 'a\x00b'"),
        ("dataloader_num_workers: 1000000", "dataloader_num_workers must be at least 0 and at most 256; it is 1000000"),
        ("crop_size: 3200000", "crop_size must be at most 16384; it is 3200000"),
    ],
    ids=range(10),
)
def test_a_config_made_to_exhaust_its_reader_is_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse_arguments(Stage2Arguments, ["--config", str(tmp_path / "recipe.yaml")])
    assert message in str(caught.value) and len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_many_keys_are_read_in_no_time_and_one_of_them_twice_is_found(tmp_path: Path) -> None:
    text = "".join(f"k{number}: 1\n" for number in range(5000))
    (tmp_path / "recipe.yaml").write_text(text + "k7: 2\n")
    with pytest.raises(UserError, match="duplicate key 'k7'"):
        parse_arguments(Stage2Arguments, ["--config", str(tmp_path / "recipe.yaml")])


def test_a_long_word_is_cut_off_in_the_message() -> None:
    for argv in (["9" * 5000], ["--seed", "x" * 5000]):
        with pytest.raises(UserError) as caught:
            parse_arguments(Stage2Arguments, argv)
        assert len(str(caught.value)) < 600


def test_every_setting_has_help_and_keeps_its_name() -> None:
    for field in dataclasses.fields(Stage2Arguments):
        assert field.metadata["help"], field.name


def other_value(name: str) -> Any:
    """A legal value of a setting that is not its default."""
    special: dict[str, Any] = {
        "crop_size": 64,
        "mixed_precision": "fp16",
        "report_to": "none",
        "max_scale": 3.0,
        "warmup_steps": 9,
        "head_width": 64,
        "lora_targets": ["query"],
    }
    special |= {"resume_from_checkpoint": "latest", "pseudo_labels": "labels", "config": "other.yaml"}
    special["label_set"] = "OpenEarthMap"
    value = getattr(Stage2Arguments(), name)
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    return f"{value} (2)" if isinstance(value, str) else value / 2 or 0.25 if isinstance(value, float) else value + 1


def other_arguments(name: str) -> Stage2Arguments:
    """The default settings but for one."""
    needed = {"pseudo_labels": "labels"} if name == "confidence_weights" else {}
    return dataclasses.replace(Stage2Arguments(), **needed, **{name: other_value(name)})


NAMES = [field.name for field in dataclasses.fields(Stage2Arguments)]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"config", "output_dir", "resume_from_checkpoint", *HUB_SETTINGS}))
def test_a_written_recipe_repeats_the_settings(tmp_path: Path, name: str) -> None:
    args = other_arguments(name)
    write_recipe(args, tmp_path)
    again = parse_arguments(Stage2Arguments, ["--config", str(tmp_path / "recipe.yaml")])
    assert getattr(again, name) != getattr(Stage2Arguments(), name)
    assert dataclasses.replace(again, config=None) == args


@pytest.mark.parametrize("folder", ["1e-4", "1e5", "no", "null", "2025", "true", "3.5", "größe: x # y", "~"])
def test_a_written_recipe_repeats_text_that_looks_like_something_else(tmp_path: Path, folder: str) -> None:
    write_recipe(Stage2Arguments(data_dir=folder), tmp_path)
    assert parse_arguments(Stage2Arguments, ["--config", str(tmp_path / "recipe.yaml")]).data_dir == folder


def test_a_recipe_contains_no_local_path(tmp_path: Path) -> None:
    """They are in a file beside it, which `--config` reads too; the output folder is in neither."""
    for name in ("network", "labels", "first", "second"):
        (tmp_path / "private" / name).mkdir(parents=True)
    private = {name: str(tmp_path / "private" / name) for name in ("network", "labels", "first", "second")}
    paths: dict[str, Any] = {"data_dir": str(tmp_path / "private"), "output_dir": str(tmp_path / "private" / "out")}
    stage2 = Stage2Arguments(**paths, model_name_or_path=private["network"], pseudo_labels=private["labels"])
    ensemble = EnsembleArguments(**paths, model=[private["first"], "org/second@v1"])
    stage1 = Stage1Arguments(**paths, source_dir=private["first"])
    for args in (stage1, stage2, ensemble):
        write_recipe(args, tmp_path)
        assert "private" not in (tmp_path / "recipe.yaml").read_text()
        again = parse_arguments(type(args), ["--config", str(tmp_path / "recipe.yaml")])
        assert dataclasses.replace(again, config=None, output_dir=args.output_dir) == args
        assert again.output_dir == type(args)().output_dir
    assert "model_name_or_path: network" in dump_recipe(stage2) and "pseudo_labels: labels" in dump_recipe(stage2)
    assert "- first\n- org/second@v1" in dump_recipe(ensemble)


@pytest.mark.parametrize("flag", ["--crop_size=64", "--crop-size=64", "--no_mask_nodata", "--no-mask-nodata"])
def test_hyphens_and_underscores_are_the_same(flag: str) -> None:
    args = parse_arguments(Stage2Arguments, [flag])
    assert (args.crop_size, args.mask_nodata) == ((64, True) if "crop" in flag else (896, False))


def test_a_switch_needs_no_value_and_swallows_none(parse: Parse) -> None:
    assert parse("", "--from_scratch", "--seed", "3").from_scratch is True
    assert parse("", "--from_scratch", "false", "--seed", "3").from_scratch is False


@pytest.mark.parametrize("settings", SETTINGS)
def test_help_lists_each_flag_once_in_groups(settings: type[HubSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        answer_help(settings, ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(settings):
        assert len(re.findall(rf"--{field.name}\b", text)) == 1, field.name
    assert "\nUpload to the Hub:\n" in text and "--hub-" not in text and "--no_" not in text
    answer_help(settings, ["--seed", "1"])  # nothing is asked


@pytest.mark.parametrize("recipe", ["stage1", "pseudo_label", "stage2", "ensemble"])
def test_help_needs_no_slow_import(recipe: str) -> None:
    command = [sys.executable, "-X", "importtime", CONFIGS.parent / f"{recipe}.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--data_dir" in result.stdout
    assert not re.search(r"\b(torch|transformers|accelerate|datasets|numpy)\b", result.stderr)


def test_a_dumped_recipe_leaves_out_what_belongs_to_one_launch() -> None:
    hub: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": True, "hub_revision": "new"}
    assert {*hub} == HUB_SETTINGS
    text = dump_recipe(Stage2Arguments(config="a.yaml", resume_from_checkpoint="latest", **hub))
    assert text == dump_recipe(Stage2Arguments())


def refusal(args: Stage2Arguments, recipe: Path) -> str:
    """Return why a resume is refused; empty if it is allowed."""
    try:
        check_same_recipe(args, recipe)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted({*NAMES} - {"config", *HUB_SETTINGS}))
def test_a_resumed_run_may_change_what_is_free_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(Stage2Arguments()))
    args = other_arguments(name)
    if name in FREE_ON_RESUME or name == "resume_from_checkpoint":
        assert refusal(args, tmp_path / "recipe.yaml") == ""
    else:
        old, new = getattr(Stage2Arguments(), name), getattr(args, name)
        assert f"{name}: {old!r} then, {new!r} now" in refusal(args, tmp_path / "recipe.yaml")
        assert "--output_dir" in refusal(args, tmp_path / "recipe.yaml")


def test_a_run_without_a_recipe_file_may_be_resumed(tmp_path: Path) -> None:
    assert refusal(Stage2Arguments(), tmp_path / "recipe.yaml") == ""


def test_a_mistake_ends_in_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise UserError("crop_size must be even")
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: crop_size must be even\n")


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="broken"), one_line_errors():
        raise RuntimeError("broken")


def test_there_are_recipes() -> None:
    assert {path.name for path in STAGE2_CONFIGS} >= {"stage2_segformer.yaml", "stage2_upernet_swinv2.yaml"}


@pytest.mark.parametrize(("settings", "path"), RECIPES, ids=[f"{path.parent.name}/{path.stem}" for _, path in RECIPES])
def test_a_recipe_states_every_setting_that_makes_the_result(settings: type[RecipeArguments], path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    args = parse_arguments(settings, ["--config", str(path)])
    stated = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    stated |= set() if args.lora_rank else {"lora_alpha", "lora_targets"}  # of adapters that there are none of
    missing = {field.name for field in dataclasses.fields(settings)} - MAY_BE_ABSENT - stated
    assert not missing, f"{path} leaves {sorted(missing)} to the defaults"
    assert len(text.splitlines()) <= 48
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("settings", "stage"), [(Stage1Arguments, "stage1"), (Stage2Arguments, "stage2")])
def test_plain_launch_is_the_headline_recipe(settings: type[RecipeArguments], stage: str) -> None:
    with_config = parse_arguments(settings, ["--config", str(CONFIGS / stage / "segformer_b5.yaml")])
    assert dump_recipe(with_config) == dump_recipe(parse_arguments(settings, []))


@pytest.mark.parametrize("name", [None, "name", "user/", "user/name/more", "user/na me"])
def test_a_push_needs_the_name_of_a_repository(name: str | None) -> None:
    with pytest.raises(UserError, match=f"^hub_model_id must be user/name to push to; it is {name!r}$"):
        Stage2Arguments(push_to_hub=True, hub_model_id=name)
    assert Stage2Arguments(hub_model_id=name).push_to_hub is False


def test_the_command_line_unsets_what_a_file_sets(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("head_width: 64\npseudo_labels: runs/labels\n", encoding="utf-8")
    args = parse_arguments(Stage2Arguments, ["--config", str(file), "--head_width", "null", "--pseudo_labels", "null"])
    assert args.head_width is None and args.pseudo_labels is None
    with pytest.raises(UserError, match="invalid int value: 'none'"):
        parse_arguments(Stage2Arguments, ["--head_width", "none"])
