"""The documentation site: it builds without a warning, needs no network, and opens from disk."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

PROJECT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
pytest.importorskip("material", reason="needs pip install -e '.[docs]'")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH to open pages with")


class Page(HTMLParser):
    """What a page loads, where its links lead, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.equations = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in LOADED and LOADED[tag] in values and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values[LOADED[tag]])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.equations += tag == "math"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_document_is_a_page(site: Path) -> None:
    documents = [path.relative_to(PROJECT / "docs") for path in (PROJECT / "docs").rglob("*.md")]
    assert len(documents) > 15
    for document in [*documents, Path("notebooks/map_a_scene.ipynb")]:
        assert (site / document.with_suffix(".html")).is_file()


def test_nothing_is_loaded_from_a_network(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.loaded
        for address in page.loaded:
            assert not urlsplit(address).netloc, f"{path} loads {address}"
            assert path.name == "404.html" or (path.parent / unquote(urlsplit(address).path)).exists(), address
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)\s]*", path.read_text(encoding="utf-8")), (
            path
        )


def test_every_link_leads_to_a_page_and_its_anchor(pages: dict[Path, Page]) -> None:
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if urlsplit(link).scheme or path.name == "404.html":
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            assert found.exists(), f"{path.name}: {link}"
            if anchor and found in pages:
                assert unquote(anchor) in pages[found].anchors, f"{path.name}: {link}"
                checked += 1
    assert checked > 500


def test_equations_are_mathml(site: Path, pages: dict[Path, Page]) -> None:
    method = (site / "method.html").read_text(encoding="utf-8")
    assert method.count('display="block"') == 10 and pages[site / "method.html"].equations > 30
    assert "$" not in re.sub(r"<(script|style).*?</\1>", "", method, flags=re.DOTALL)
    assert "merror" not in method and "\\mathrm" not in method


def test_the_search_finds_pages_and_docstrings(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    for words in ("Reverse cross entropy", "api/models.html#hf_seg.ensemble.EnsembleForSemanticSegmentation", "seam"):
        assert words in index


def test_the_settings_are_those_of_the_code(site: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", (site / "settings.html").read_text(encoding="utf-8"))
    assert re.search(r"rce_weight\s+1\.0\s+weight of reverse cross entropy\s+yes", text)
    assert re.search(r"method\s+dacs\s+self-training, or the source loss alone \(dacs, source_only\)\s+yes", text)
    assert "<!-- settings" not in (site / "settings.html").read_text(encoding="utf-8")


def browse(address: str, profile: Path, *flags: str) -> str:
    """Open a file in a browser and return its elements as they are after the scripts; a console message is an error."""
    flags += ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    flags += ("disable-component-update", "disable-sync", f"user-data-dir={profile}", "enable-logging=stderr")
    command = ["chromium", "--headless", *(f"--{flag}" for flag in flags), "--virtual-time-budget=8000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{address}"], check=True, capture_output=True, text=True, timeout=120)
    assert not re.findall(".*CONSOLE.*", done.stderr)
    return done.stdout


@needs_chromium
@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("method.html", r"<math"),
        ("api/models.html", r"from_pretrained"),
        ("index.html?q=lovasz", r"md-search-result__item[\s\S]*arithmetic\.html"),  # the search runs from disk too
    ],
)
def test_a_browser_opens_it_from_disk(site: Path, tmp_path: Path, page: str, expected: str) -> None:
    assert re.search(expected, browse(f"{site}/{page}", tmp_path / "profile"))


@needs_chromium
def test_no_page_is_wider_than_a_phone(site: Path, pages: dict[Path, Page], tmp_path: Path) -> None:
    frames = "".join(f'<iframe width="390" height="800" src="file://{path}"></iframe>' for path in pages)
    roots = "[...document.querySelectorAll('iframe')].map(frame => frame.contentDocument.documentElement)"
    measure = f"{roots}.map(root => root.scrollWidth - root.clientWidth)"
    script = f"onload = () => document.body.insertAdjacentHTML('beforeend', `<pre>${{{measure}}}</pre>`)"
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}<script>{script}</script>")
    found = browse(f"{tmp_path}/frames.html", tmp_path / "profile", "allow-file-access-from-files")
    excess = re.findall(r"<pre>(.*?)</pre>", found)[-1].split(",")
    assert [(path.name, pixels) for path, pixels in zip(pages, excess, strict=True) if pixels != "0"] == []
