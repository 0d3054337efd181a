"""Scenes that cannot be mapped."""

import numpy as np

from bad_inputs.case import (
    PREDICT,
    Case,
    both,
    cut,
    folder,
    grey,
    noise,
    nothing,
    overwrite,
    raw_tiff,
    remove,
    tiff,
    write,
)

SCENE, MAP = "scene.tif", "map.tif"
MILLIARD = 10**9
PALETTE = {index: (index, 0, 0, 255) for index in range(256)}
COMPLEX = noise(64, 64).astype(np.complex64)
VRT = """<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="1">{}</SourceFilename><SourceBand>1</SourceBand>
</SimpleSource></VRTRasterBand></VRTDataset>"""


def _scene(wrong: str, make, says: str = SCENE, flags: str = "") -> Case:  # type: ignore[no-untyped-def]
    return Case("scene", wrong, make, f"{PREDICT} {flags}".rstrip(), says)


SCENES = (
    _scene("does not exist", remove(SCENE)),
    _scene("empty file", write(SCENE, b"")),
    _scene("a folder without scenes", folder(SCENE)),
    _scene("cut after 8 bytes", write(SCENE, b"II*\0\x08\0\0\0")),
    _scene("cut after a tenth", cut(SCENE, 0.1)),
    _scene("cut in the middle", cut(SCENE, 0.5)),
    _scene("last tenth missing", cut(SCENE, 0.9)),
    _scene("random bytes", write(SCENE, noise(4096).tobytes())),
    _scene("text", write(SCENE, "<html>404 Not Found</html>")),
    _scene("a link to itself", both(remove(SCENE), lambda work: (work / SCENE).symlink_to(SCENE))),
    _scene("complex numbers", tiff(SCENE, COMPLEX)),
    _scene("two bands", tiff(SCENE, noise(2, 64, 64)), "--bands"),
    _scene("seven bands", tiff(SCENE, noise(7, 64, 64)), "--bands"),
    _scene("colour table", tiff(SCENE, noise(64, 64), photometric="palette"), "colour table"),
    _scene("header of 10^9 x 10^9 px", write(SCENE, raw_tiff(grey(MILLIARD, MILLIARD), bytes(64)))),
    _scene("header of 10^9 x 1 px", write(SCENE, raw_tiff(grey(MILLIARD, 1), bytes(64)))),
    _scene("header of 64 x 10^9 px", write(SCENE, raw_tiff(grey(64, MILLIARD, tag278=1), bytes(64)))),
    _scene("header of 0 x 0 px", write(SCENE, raw_tiff(grey(0, 0), bytes(64)))),
    _scene("header of 0 x 64 px", write(SCENE, raw_tiff(grey(0, 64), bytes(64)))),
    _scene("sparse file of 10^6 x 10^6 px", write(SCENE, raw_tiff(grey(10**6, 10**6, tag273=0, tag279=0)))),
    _scene("strips beyond the end", write(SCENE, raw_tiff(grey(64, 64, tag273=10**9), bytes(4096)))),
    _scene("one strip of 2^31 rows", write(SCENE, raw_tiff(grey(64, 64, tag278=2**31), bytes(512)))),
    _scene("3 bits a pixel, cut", write(SCENE, raw_tiff(grey(64, 64, tag258=3), bytes(64)))),
    _scene("65535 bands", write(SCENE, raw_tiff(grey(64, 64, tag277=65535), bytes(4096)))),
    _scene("unknown compression", write(SCENE, raw_tiff(grey(64, 64, tag259=4711), bytes(4096)))),
    _scene("directory that refers to itself", write(SCENE, b"II*\0\x08\0\0\0" + bytes(2) + b"\x08\0\0\0")),
    _scene(
        "corrupt DEFLATE",
        both(tiff(SCENE, noise(256, 256), compress="deflate"), overwrite(SCENE, 0.5, bytes(range(256)))),
    ),
    _scene("corrupt LZW", both(tiff(SCENE, noise(256, 256), compress="lzw"), overwrite(SCENE, 0.5, bytes(200)))),
    _scene(
        "corrupt ZSTD, tiled",
        both(tiff(SCENE, noise(256, 256) // 50, compress="zstd", tiled=True), overwrite(SCENE, 0.5, bytes(200))),
    ),
    _scene("every pixel is nodata", tiff(SCENE, np.full((64, 64), 7, np.uint8), nodata=7)),
    _scene("every pixel is NaN", tiff(SCENE, np.full((64, 64), np.nan, np.float32))),
    _scene("every pixel is 0", tiff(SCENE, np.zeros((64, 64), np.uint8))),
    _scene("16 bits, one value", tiff(SCENE, np.full((64, 64), 500, np.uint16))),
    _scene("floats, all infinite", tiff(SCENE, np.full((64, 64), np.inf, np.float32))),
    _scene("JPEG under .tif, cut", both(tiff(SCENE, noise(64, 64), driver="JPEG"), cut(SCENE, 0.3))),
    _scene("NetCDF of several variables", write(SCENE, b"CDF\x01" + bytes(60))),
    _scene("VRT of a missing file", write(SCENE, VRT.format("/nowhere.tif"))),
    _scene("VRT that refers to itself", write(SCENE, VRT.format("scene.tif"))),
    Case("scene", "name of 5000 letters", nothing, f"hf-seg predict {'a' * 5000}.tif map.tif --model model", "aaa"),
    Case(
        "scene",
        "name with a line break",
        write("two\nlines.tif", b""),
        "hf-seg predict 'two\nlines.tif' map.tif --model model",
        "two",
    ),
    Case("scene", "pattern without matches", nothing, "hf-seg predict none*.tif map.tif --model model", "none*.tif"),
    Case(
        "scene",
        "two scenes for one map",
        nothing,
        "hf-seg predict scene.tif sar/train/sar_images map.tif --model model",
        MAP,
    ),
    Case(
        "scene",
        "two scenes of one name",
        folder("maps"),
        "hf-seg predict scene.tif sar/../scene.tif ./scene.tif maps/ --model model",
        "scene.tif",
    ),
    Case("map", "exists already", tiff(MAP, noise(8, 8)), PREDICT, "--overwrite"),
    Case("map", "is the scene", nothing, PREDICT.replace("map.tif", "scene.tif") + " --overwrite", "scene itself"),
    Case("map", "ends in .png", nothing, PREDICT.replace("map.tif", "map.png"), "map.png"),
    Case(
        "map",
        "in a folder that is a file",
        nothing,
        PREDICT.replace("map.tif", "scene.tif/map.tif"),
        "scene.tif/map.tif",
    ),
    Case("map", "name of 5000 letters", nothing, PREDICT.replace("map.tif", "b" * 5000 + ".tif"), "bbb"),
    Case("map", "polygons exist", write("map.gpkg", b"x"), f"{PREDICT} --polygons .gpkg", "map.gpkg"),
    _scene("--datetime is no time", nothing, "yesterday", "--stac --datetime yesterday"),
)
