"""What MkDocs calls while it builds the site: files outside docs/, the notebook, and tables of settings."""

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Pages include these files of the repository, so links to them lead to the pages.
PAGES = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "hf_seg/demo/README.md": "demo.md",
    "hf_seg/mapping/README.md": "mapping.md",
    "hf_seg/studies/README.md": "studies.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
IMAGES = ("recipes/quickstart.png",)
NOTEBOOKS = ("notebooks/map_a_scene.ipynb",)
LINK = re.compile(r"(!?)\[([^][]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
SETTINGS = re.compile(r"<!-- settings: (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add images from outside docs/, and the notebook as Markdown with its pictures."""
    for path in IMAGES:
        files.append(File.generated(config, f"assets/{Path(path).name}", abs_src_path=os.path.abspath(path)))
    for name in NOTEBOOKS:
        for path, content in render_notebook(Path(config.docs_dir, name)).items():
            files.append(File.generated(config, f"{Path(name).parent}/{path}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the settings, and lead links out of docs/ to a page, to the repository, or nowhere."""
    markdown = SETTINGS.sub(lambda found: settings_table(found[1]), markdown)
    folder = os.path.dirname(page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups(default="")
        path = os.path.normpath(os.path.join(folder, target)).replace(os.sep, "/")
        if not path.startswith("../"):
            return found[0]
        path = path.removeprefix("../")
        if not (Path(config.config_file_path).parent / path).exists():
            return found[0]  # MkDocs warns
        inside = PAGES.get(path) or (path in IMAGES and f"assets/{Path(path).name}")
        if inside:
            return f"{mark}[{text}]({os.path.relpath(inside, folder or '.')}{anchor})"
        repository = config.extra["repository"]
        return f"[{text}]({repository}/blob/main/{path}{anchor})" if repository else text

    return LINK.sub(lead, markdown)


def render_notebook(path: Path) -> dict[str, str | bytes]:
    """Return the page of a notebook, with its outputs, and its pictures, by file name."""
    from nbconvert import MarkdownExporter

    body, resources = MarkdownExporter().from_filename(str(path))
    body = re.sub(r"<style scoped>.*?</style>", "", body, flags=re.DOTALL)  # of pandas: the site's own suits
    body = body.replace('<table border="1" class="dataframe">', "<table>").replace("![png](", "![figure](")
    return {path.with_suffix(".md").name: body, **resources["outputs"]}


def settings_table(name: str) -> str:
    """Return the settings that a dataclass of `hf_seg.arguments` declares itself as a table."""
    from hf_seg import arguments

    settings = getattr(arguments, name)
    hints = typing.get_type_hints(settings)
    rows = ["| setting | default | meaning | result |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(settings):
        if field.name in settings.__annotations__:
            default = field.default_factory() if callable(field.default_factory) else field.default
            choices = (
                typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
            )
            meaning = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
            result = "" if field.metadata["free"] else "yes"
            rows.append(f"| `{field.name}` | {show(default)} | {meaning} | {result} |")
    return "\n".join(rows)


def show(default: Any) -> str:
    """Return a default as it would be written in YAML."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"
