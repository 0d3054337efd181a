"""The page: what is on it, and what its buttons do. Gradio is imported here and in `serve` alone."""

import html
import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from hf_seg.demo.jobs import FILES, MappedScene, StoppedError, run_job
from hf_seg.demo.models import Models
from hf_seg.demo.sessions import Session, Sessions, take_upload
from hf_seg.demo.settings import DemoSettings
from hf_seg.demo.uploads import check_scene, safe_name
from hf_seg.demo.view import view_scene
from hf_seg.errors import UserError
from hf_seg.files import remove
from hf_seg.mapping.options import UNITS

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
TITLE = "Land cover from SAR"
INTRODUCTION = "Upload a radar scene, choose a model, and get its land cover as files for a GIS."
UNIT_NAMES = {"linear": "amplitude", "power": "power", "db": "decibels"}
TTA_NAMES = {"none": "none", "flips": "4 flips, four times as slow"}
PROGRESS = gr.Progress()  # Gradio gives each call of a handler with this default one of its own
SHOW_MAP = "() => document.querySelector('#viewer').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
FAILED = "The server failed on this scene. Its log says why."


class Page:
    """The handlers of the page's events; each returns new values of the components it is bound to.

    Args:
        samples: scenes that the page offers, GeoTIFFs.
    """

    def __init__(self, models: Models, sessions: Sessions, settings: DemoSettings, samples: Sequence[Path]) -> None:
        self.models, self.sessions, self.settings, self.samples = models, sessions, settings, list(samples)

    def take_upload(self, upload: str | None, request: gr.Request) -> list[Any]:
        """Check an upload and show it; -> file, figures, status, run button, then the downloads."""
        if upload is None:
            return self.forget(request)
        return self._take(Path(upload), take_upload, request)

    def take_sample(self, index: int, request: gr.Request) -> list[Any]:
        """Take one of the samples in place of an upload."""
        return self._take(self.samples[index], lambda sample, place: place.symlink_to(sample), request)

    def _take(self, source: Path, link: Callable[[Path, Path], object], request: gr.Request) -> list[Any]:
        session = self.sessions.get(request.session_hash)
        session.scene = None
        session.stop.set()
        folder = session.new_folder()
        try:
            scene = folder / safe_name(source.name)
            link(source, scene)
            facts = check_scene(scene, max_megapixels=self.settings.max_megapixels)
            view = view_scene(scene)
        except Exception as error:
            remove(folder)
            return [None, None, self._problem(error, session), gr.Button(interactive=False), *_no_downloads()]
        session.keep_only(folder)
        session.scene = scene
        shown = None if scene.is_symlink() else str(scene)  # a sample lies in a folder that is not served
        return [shown, view, _note(str(facts)), gr.Button(interactive=True), *_no_downloads()]

    def forget(self, request: gr.Request) -> list[Any]:
        """Delete the scene and its map."""
        session = self.sessions.get(request.session_hash)
        session.scene = None
        session.stop.set()
        session.keep_only()
        return [None, None, "", gr.Button(interactive=False), *_no_downloads()]

    def begin(self, request: gr.Request) -> list[Any]:
        """Prepare a run; -> run button, stop button, status, then the downloads."""
        self.sessions.get(request.session_hash).stop = threading.Event()  # the last run may still have to see its own
        return [gr.Button(interactive=False), gr.Button(interactive=True), "", *_no_downloads()]

    def run(
        self, model: str, abstain: float, units: str, tta: str, request: gr.Request, progress: Any = PROGRESS
    ) -> list[Any]:
        """Map the scene; -> figures, status, then the downloads."""
        session = self.sessions.get(request.session_hash)
        scene, stop = session.scene, session.stop
        if scene is None:
            return [gr.skip(), _note("Upload a scene or take a sample first.", is_error=True), *_no_downloads()]

        def on_progress(done: int, total: int) -> None:
            if stop.is_set():
                raise StoppedError
            progress((done, total), desc="Mapping" if done < total else "Writing the files", unit="windows")

        with self.sessions.running(session):
            folder = session.new_folder()
            try:
                progress(0, desc="Loading the model")
                options = {"abstain": abstain, "units": units, "tta": tta, "stride": self.settings.stride}
                mapped = run_job(self.models.load(model), scene, folder, on_progress=on_progress, **options)
                if stop.is_set():
                    raise StoppedError
            except Exception as error:
                remove(folder)
                problem = StoppedError() if stop.is_set() else error  # a stopped run may miss files that are deleted
                return [gr.skip(), self._problem(problem, session), *_no_downloads()]
            session.keep_only(scene.parent, folder)
            return [mapped.view, _note(_summary(mapped)), *_downloads(mapped)]

    def end(self, request: gr.Request) -> list[Any]:
        """Allow the next run; -> run button, stop button."""
        has_scene = self.sessions.get(request.session_hash).scene is not None
        return [gr.Button(interactive=has_scene), gr.Button(interactive=False)]

    def stop(self, request: gr.Request) -> list[Any]:
        """Stop the run, or take it out of the queue; -> run button, stop button, status."""
        self.sessions.get(request.session_hash).stop.set()
        return [*self.end(request), _note("Stopped.")]

    def leave(self, request: gr.Request) -> None:
        """Delete everything of a user who has closed the page."""
        self.sessions.close(request.session_hash)

    def _problem(self, error: Exception, session: Session) -> str:
        """Return what the user sees of an error: never a path of the server."""
        if isinstance(error, StoppedError):
            return _note("Stopped.")
        if not isinstance(error, UserError):
            logger.exception("a request failed")
            return _note(FAILED, is_error=True)
        return _note(re.sub(rf"{re.escape(str(session.folder))}/\w+/", "", str(error)), is_error=True)


def build_page(models: Models, sessions: Sessions, settings: DemoSettings, samples: Sequence[Path]) -> gr.Blocks:
    """Build the page.

    Args:
        models: that a user may choose from.
        sessions: the files of the users, in Gradio's temporary folder.
        settings: limits.
        samples: scenes that the page offers.
    """
    page = Page(models, sessions, settings, samples)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<h1>{TITLE}</h1><p>{INTRODUCTION}</p>", elem_classes="hfs-header")
        with gr.Row(elem_classes="hfs-layout"):
            with gr.Column(scale=1, min_width=300, elem_classes="hfs-side"):
                upload, buttons = _scene_inputs(settings, samples)
                model = gr.Dropdown(
                    models.labels(),
                    label="Model",
                    allow_custom_value=models.allow_any,
                    interactive=True,
                    elem_id="model",
                )
                abstain, units, tta = _mapping_inputs()
                with gr.Row(elem_classes="hfs-actions"):
                    run = gr.Button("Map the scene", variant="primary", interactive=False, elem_id="run", scale=3)
                    stop = gr.Button("Stop", interactive=False, elem_id="stop", scale=1, min_width=80)
                status = gr.HTML(elem_id="status")
            with gr.Column(scale=4, min_width=300):
                viewer = _viewer()
                with gr.Row(elem_classes="hfs-downloads"):
                    downloads = [
                        gr.DownloadButton(label, size="md", visible=False, elem_id=f"download-{key}", min_width=130)
                        for key, label in FILES.items()
                    ]
        hidden: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        shown = [upload, viewer, status, run, *downloads]
        upload.upload(
            page.take_upload, upload, shown, **{**hidden, "show_progress": "minimal"}, show_progress_on=viewer
        )
        upload.clear(page.forget, None, shown, **hidden)
        for index, button in enumerate(buttons):
            button.click(_Sample(page, index), None, shown, **hidden)
        run.click(None, None, None, js=SHOW_MAP)
        begun = run.click(page.begin, None, [run, stop, status, *downloads], **hidden)
        running = begun.then(
            page.run,
            [model, abstain, units, tta],
            [viewer, status, *downloads],
            show_progress_on=viewer,
            concurrency_limit=settings.parallel,
            api_visibility="private",
        )
        running.then(page.end, None, [run, stop], **hidden)
        stop.click(page.stop, None, [run, stop, status], cancels=[running], **hidden)
        blocks.unload(page.leave)
    blocks.queue(max_size=settings.waiting, api_open=False)
    return blocks


def _scene_inputs(settings: DemoSettings, samples: Sequence[Path]) -> tuple[gr.File, list[gr.Button]]:
    """Add the upload and a button for each sample."""
    upload = gr.File(label="Scene, GeoTIFF", file_types=[".tif", ".tiff"], height=130, elem_id="upload")
    limits = f"Up to {settings.max_megapixels:g} million pixels and {settings.max_upload_mib} MiB."
    gr.HTML(f"<p>{limits} Your files are deleted when you close this page.</p>", elem_classes="hfs-hint")
    names = ["Take the sample scene"] if len(samples) == 1 else [f"Sample: {path.stem}" for path in samples]
    buttons = [gr.Button(name, size="sm", elem_id=f"sample-{index}") for index, name in enumerate(names)]
    return upload, buttons


def _mapping_inputs() -> tuple[gr.Slider, gr.Radio, gr.Radio]:
    """Add the settings of the mapping: abstain, units, test-time augmentation."""
    abstain = gr.Slider(
        0,
        0.95,
        0,
        step=0.05,
        label="Abstain below",
        info="Pixels of a lower confidence get no class in the files.",
        elem_id="abstain",
    )
    with gr.Accordion("More options", open=False):
        units = gr.Radio([(UNIT_NAMES[unit], unit) for unit in UNITS], value="linear", label="Values of the scene")
        tta = gr.Radio([(name, tta) for tta, name in TTA_NAMES.items()], value="none", label="Test-time augmentation")
    return abstain, units, tta


def _viewer() -> gr.HTML:
    """Add the map of scene and land cover; its value is what `hf_seg.demo.view` returns."""
    template, script = (STATIC / name for name in ("viewer.html", "viewer.js"))
    return gr.HTML(
        None,
        html_template=template.read_text(encoding="utf-8"),
        js_on_load=script.read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="viewer",
    )


class _Sample:
    """The handler of one sample's button."""

    def __init__(self, page: Page, index: int) -> None:
        self.page, self.index = page, index

    def __call__(self, request: gr.Request) -> list[Any]:
        return self.page.take_sample(self.index, request)


def _downloads(mapped: MappedScene) -> list[Any]:
    files = [mapped.files.get(key) for key in FILES]
    return [gr.DownloadButton(value=path and str(path), visible=path is not None) for path in files]


def _no_downloads() -> list[Any]:
    return [gr.DownloadButton(value=None, visible=False) for _ in FILES]


def _summary(mapped: MappedScene) -> str:
    pixels = sum(mapped.summary.pixels.values()) + mapped.summary.nodata_pixels
    return f"Mapped {pixels:,d} pixels in {mapped.summary.seconds:.0f} s."


def _note(text: str, *, is_error: bool = False) -> str:
    kind, role = ("error", "alert") if is_error else ("note", "status")
    return f'<p class="hfs-{kind}" role="{role}">{html.escape(text)}</p>'
