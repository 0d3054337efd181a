"""The settings of the page. Import-light, so that the command answers `--help` before its slow imports."""

from dataclasses import dataclass

from hf_seg.settings import check_bounds, setting


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: every network that this computer is in")
    port: int | None = setting(None, "port to listen on; default: the first free one from 7860 up", low=1, high=65535)
    parallel: int = setting(1, "scenes that are mapped at the same time", low=1)
    waiting: int = setting(16, "requests that may wait; later ones are refused", low=1)
    keep_minutes: float = setting(
        60.0, "files of a page that is open but not used are deleted after this time", above=0
    )


@dataclass(frozen=True, kw_only=True)
class DemoSettings(ServerSettings):
    """Scenes and models.

    Raises:
        UserError: a value out of its bounds.
    """

    any_model: bool = setting(
        False, "users may also type another folder or Hub id: they can make this computer open any of its folders"
    )
    max_megapixels: float = setting(25.0, "size of the largest scene, in millions of pixels", above=0, high=400)
    max_upload_mib: int = setting(256, "size of the largest file, in MiB", low=1)
    stride: float = setting(0.5, "step of the sliding window as a fraction of the window", above=0, high=1)
    sample_size: int = setting(
        1024,
        "side of the synthetic sample scene in pixels, without --sample; 400 bytes of memory each",
        low=64,
        high=4096,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
