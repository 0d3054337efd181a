"""The server of the page: Gradio, with nothing that asks the network, and a temporary folder of its own."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Read by Gradio when it is imported and when the page is built.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware

from hf_seg.demo.guard import Guard
from hf_seg.demo.models import Models
from hf_seg.demo.page import STATIC, build_page
from hf_seg.demo.sessions import Sessions
from hf_seg.demo.settings import DemoSettings
from hf_seg.demo.uploads import check_scene
from hf_seg.errors import UserError

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "Menlo", "Consolas", "monospace")


class Server(NamedTuple):
    """A page that is being served: its address, and the files of its users."""

    url: str
    sessions: Sessions


@contextlib.contextmanager
def serving(names: Sequence[str], settings: DemoSettings, *, samples: Sequence[str | Path] = ()) -> Iterator[Server]:
    """Serve the page while the block runs; at its end all files of the users are deleted.

    Args:
        names: folders or Hub ids of the models.
        samples: GeoTIFFs that the page offers; none: a synthetic scene is made.

    Raises:
        UserError: a model or sample that cannot be used, or a port that is taken.
    """
    models = Models(names, allow_any=settings.any_model)
    with tempfile.TemporaryDirectory(prefix="hf_seg_demo_", ignore_cleanup_errors=True) as temporary:
        root, public = Path(temporary).resolve(), Path(temporary).resolve() / "gradio"
        public.mkdir()
        with _gradio_folders(public, root):
            sessions = Sessions(public, keep_seconds=60 * settings.keep_minutes)
            scenes = _find_samples(samples, root / "samples", settings)
            page = build_page(models, sessions, settings, scenes)
            try:
                url = _launch(page, public, settings)
            except OSError:
                raise UserError(f"port {settings.port} of {settings.host} is taken; choose another --port") from None
            try:
                with sessions.sweeping():
                    yield Server(url, sessions)
            finally:
                page.close(verbose=False)


@contextlib.contextmanager
def _gradio_folders(public: Path, root: Path) -> Iterator[None]:
    """Let Gradio write to a folder, and serve files from there only."""
    folders = {"GRADIO_TEMP_DIR": public, "GRADIO_EXAMPLES_CACHE": root / "examples"}
    before = {name: os.environ.get(name) for name in folders}
    os.environ.update({name: str(folder) for name, folder in folders.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _find_samples(samples: Sequence[str | Path], folder: Path, settings: DemoSettings) -> list[Path]:
    """Check the samples, or make one."""
    folder.mkdir()
    if not samples:
        from hf_seg.synthetic import write_sar_scene  # not needed for others

        return [write_sar_scene(folder / "synthetic_scene.tif", size=settings.sample_size)]
    for sample in samples:
        if not Path(sample).is_file():
            raise UserError(f"--sample {sample} is not a file")
        check_scene(Path(sample), max_megapixels=settings.max_megapixels)
    return [Path(sample).resolve() for sample in samples]


def _launch(page: gr.Blocks, folder: Path, settings: DemoSettings) -> str:
    """Start the server in threads and return its address."""
    max_bytes = settings.max_upload_mib << 20
    guard = Middleware(Guard, folder=folder, max_bytes=max_bytes)
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS)
    dim = dict.fromkeys(("body_text_color_subdued", "block_info_text_color", "block_label_text_color"), "*neutral_600")
    theme.set(**dim, **{f"{name}_dark": "*neutral_300" for name in dim})  # its own are too pale to read
    theme.set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
    style = (STATIC / "page.css").read_text(encoding="utf-8")
    _, url, _ = page.launch(
        server_name=settings.host,
        server_port=settings.port,
        max_file_size=max_bytes,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        head=f"<style>{style}</style>",  # `css` would lose @container
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return str(url)
