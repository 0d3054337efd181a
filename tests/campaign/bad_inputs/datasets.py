"""Folders of datasets: split lists, dataset.json and what is missing."""

from bad_inputs.case import (
    AUDIT,
    CHECK,
    CHECK_OEM,
    EVALUATE,
    STAGE1,
    STAGE2,
    TRAIN,
    Case,
    both,
    folder,
    nothing,
    remove,
    write,
    write_json,
)

ROWS = "acre_1.tif\nnorth-town_2.tif\n"
DESCRIPTION = {"name": "mine", "layout": "OpenEarthMap-SAR"}


def _list(wrong: str, content: bytes | str, says: str, code: int = 0, command: str = CHECK_OEM) -> Case:
    return Case("train.txt", wrong, write("oem/train.txt", content), command, says, code)


def _described(wrong: str, content: object, says: str = "dataset.json") -> Case:
    return Case("dataset.json", wrong, write_json("sar/dataset.json", content), STAGE2 + TRAIN, says)


DATASETS = (
    Case("dataset", "does not exist", remove("sar"), STAGE2 + TRAIN, "sar"),
    Case("dataset", "empty folder", folder("sar"), STAGE2 + TRAIN, "sar"),
    Case("dataset", "is a file", both(remove("sar"), write("sar", b"zip")), STAGE2 + TRAIN, "sar"),
    Case("dataset", "the other layout", nothing, STAGE2.replace("sar", "oem") + TRAIN, "oem"),
    Case("dataset", "name of 5000 letters", nothing, STAGE2.replace("sar", "a" * 5000) + TRAIN, "aaa"),
    Case("dataset", "a split without tiles", remove("sar/val"), EVALUATE, "val"),
    Case("dataset", "labels of the split missing", remove("sar/val/labels"), EVALUATE, "label"),
    Case(
        "dataset", "no SAR images", remove("sar/train/sar_images", "sar/val/sar_images"), STAGE2 + TRAIN, "sar_images"
    ),
    Case("dataset", "no split list", remove("oem/train.txt", "oem/val.txt"), STAGE1 + TRAIN, "oem"),
    Case("dataset", "a Hub name, offline", nothing, STAGE2.replace("sar", "org/none") + TRAIN, "org/none"),
    Case(
        "dataset",
        "a broken Hub name",
        nothing,
        STAGE2.replace("--data_dir sar", "--data_dir hf://datasets/x") + TRAIN,
        "hf://datasets/x",
    ),
    _list("empty", b"", "train", 2, STAGE1 + TRAIN),
    _list("names twice", ROWS + ROWS, "listed twice"),
    _list("absolute names", "/etc/passwd.tif\n" + ROWS, "listed but not on disk"),
    _list("names with ..", "../../acre_1.tif\n" + ROWS, "listed but not on disk"),
    _list(
        "CRLF and a byte order mark: read as it should", b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n").encode(), "train"
    ),
    _list("UTF-16", ROWS.encode("utf-16"), "train", 1),
    _list("not UTF-8", b"\xff\xfe\xfd.tif\n" + ROWS.encode(), "listed but not on disk"),
    _list("one line of a million letters", "a" * 1_000_000, "train.txt", 2),
    _list("a name of 5000 digits", "9" * 5000 + ".tif\n" + ROWS, "listed but not on disk"),
    _list("an open quotation mark", '"acre_1.tif\nnorth-town_2.tif\n', "train", 1),
    _list("NUL bytes", "\0\0.tif\n" + ROWS, "listed but not on disk"),
    Case("train.txt", "a folder", folder("oem/train.txt"), STAGE1 + TRAIN, "train"),
    Case(
        "train.txt",
        "a link to itself",
        both(remove("oem/train.txt"), lambda work: (work / "oem/train.txt").symlink_to("train.txt")),
        STAGE1 + TRAIN,
        "train",
    ),
    Case("dataset.json", "empty", write("sar/dataset.json", b""), STAGE2 + TRAIN, "dataset.json"),
    Case("dataset.json", "not UTF-8", write("sar/dataset.json", b'{"name": "\xff"}'), STAGE2 + TRAIN, "dataset.json"),
    Case(
        "dataset.json",
        "100,000 open brackets",
        write("sar/dataset.json", "[" * 100_000),
        STAGE2 + TRAIN,
        "dataset.json",
    ),
    Case("dataset.json", "a folder", folder("sar/dataset.json"), STAGE2 + TRAIN, "dataset.json"),
    Case(
        "dataset.json",
        "number of 5000 digits",
        write("sar/dataset.json", '{"name": ' + "9" * 5000 + "}"),
        STAGE2 + TRAIN,
        "dataset.json",
    ),
    _described("a list", [1, 2]),
    _described("no name", {"layout": "OpenEarthMap-SAR"}),
    _described("another layout", {"name": "mine", "layout": "OpenEarthMap"}),
    _described("bands of an unknown column", {**DESCRIPTION, "bands": {"radar": ["VV"]}}),
    _described("bands named twice", {**DESCRIPTION, "bands": {"sar": ["VV", "vv"]}}),
    _described("more bands than the files", {**DESCRIPTION, "bands": {"sar": ["VV", "VH"]}}, "VV"),
    _described("bands are numbers", {**DESCRIPTION, "bands": {"sar": [1, 2]}}),
    _described("synthetic is text", {**DESCRIPTION, "synthetic": "yes"}),
    _described("labels is a list", {**DESCRIPTION, "labels": []}),
    _described("one class", {**DESCRIPTION, "classes": [{"id": 1, "name": "water"}]}),
    _described("a class twice", {**DESCRIPTION, "classes": [{"id": 1, "name": "a"}, {"id": 2, "name": "A"}]}),
    Case("audit", "a set that does not exist", nothing, "hf-seg audit none labels --output run", "none"),
    Case("audit", "a set that is a file", nothing, "hf-seg audit scene.tif labels --output run", "scene.tif"),
    Case("audit", "a set without images", folder("empty"), "hf-seg audit empty labels --output run", "empty"),
    Case("audit", "sets without a common tile", nothing, "hf-seg audit oem labels --output run", "share no image id"),
    Case("audit", "--images without the tiles", nothing, f"{AUDIT} --images oem/acre/images", "oem/acre/images"),
    Case("audit", "output folder with other files", write("run/notes.txt", b"x"), AUDIT, "run"),
    Case("regions CSV", "other columns", write("r.csv", "a,b\n1,2\n"), f"{AUDIT} --regions r.csv", "r.csv"),
    Case("regions CSV", "empty", write("r.csv", ""), f"{AUDIT} --regions r.csv", "r.csv"),
    Case(
        "regions CSV", "not UTF-8", write("r.csv", b"image_id,region\n\xff,\xfe\n"), f"{AUDIT} --regions r.csv", "r.csv"
    ),
    Case(
        "regions CSV",
        "an open quotation mark",
        write("r.csv", 'image_id,region\n"a,b\nc,d\n'),
        f"{AUDIT} --regions r.csv",
        "r.csv",
    ),
    Case(
        "regions CSV",
        "none of the tiles",
        write("r.csv", "image_id,region\nx,y\n"),
        f"{AUDIT} --regions r.csv",
        "r.csv",
    ),
    Case("regions CSV", "NUL bytes", write("r.csv", b"\0" * 100), f"{AUDIT} --regions r.csv", "r.csv"),
    Case("regions CSV", "does not exist", nothing, f"{AUDIT} --regions r.csv", "r.csv"),
    Case("check", "the folder contains no dataset", folder("none"), CHECK.replace("sar", "none"), "none"),
    Case(
        "check",
        "the report cannot be written",
        nothing,
        CHECK.replace("run.json", "scene.tif/run.json"),
        "scene.tif/run.json",
    ),
    Case("check", "the report's name is a folder", folder("run.json"), CHECK, "run.json"),
)
