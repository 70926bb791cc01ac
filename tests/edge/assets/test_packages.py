"""Real packages, as published: built without a wrong or a missing reference, and shown by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from edge.assets import css
from edge.assets.build import Options, Result, build
from edge.assets.kinds import Kind, is_hashed, kind_of
from tests.edge.assets.conftest import Workshop
from tests.support.chromium import browser
from tests.support.npm import node_modules

PACKAGES = Path(__file__).with_name("packages")
NAMES = (
    *("swagger-ui-dist", "bootstrap", "katex", "tinymce", "@fortawesome/fontawesome-free"),
    "monaco-editor",
)
CSP = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'"

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def modules() -> Path:
    return node_modules(PACKAGES)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_builds_without_a_wrong_or_missing_reference(modules, tmp_path, name):
    """Encodings are left out: they depend on bytes alone and are proven elsewhere, and take most of the time."""
    source, out = modules / name, tmp_path / "out"
    result = build(source, out, tmp_path / "cache", Options(codings=()))
    assert {issue.code for issue in result.issues} <= {
        *("bare-specifier", "missing-absolute", "missing-map", "unparsed-script", "missing")
    }
    known = {(issue.path, issue.text.partition(" ")[0].strip("'")) for issue in result.issues}
    origin = {asset.file: path for path, asset in result.manifest.files.items()}
    checked = 0
    for path, asset in result.manifest.files.items():
        if kind_of(path) is Kind.CSS and not is_hashed(path):
            checked += agree(origin, path, asset.file, styles(source / path), styles(out / asset.file), known)
    scripts = [path for path in result.manifest.files if kind_of(path) is Kind.SCRIPT and not is_hashed(path)]
    before = lexed(modules, [source / path for path in scripts])
    after = lexed(modules, [out / result.manifest.files[path].file for path in scripts])
    unparsed = {issue.path for issue in result.issues if issue.code == "unparsed-script"}
    for path, old, new in zip(scripts, before, after, strict=True):
        if old is not None and path not in unparsed:
            assert new is not None, f"{path} is no module any more"
            checked += agree(origin, path, result.manifest.files[path].file, old, new, known)
    assert checked >= {"swagger-ui-dist": 0, "tinymce": 0}.get(name, 1)


def agree(
    origin: dict[str, str], path: str, file: str, old: list[str], new: list[str], known: set[tuple[str, str]]
) -> int:
    """Each reference of the source leads, in what was built, to what was built of the same file; how many did."""
    old, new = ([url for url in urls if not re.match(r"[a-z]+:|#|//", url)] for urls in (old, new))
    resolved = Counter(leads_to(path, url) for url in old)
    for url in new:
        target = leads_to(file, url)
        if target in origin:
            resolved[origin[target]] -= 1
        else:  # written as it was, since it leads nowhere; which was said, or a page's own business
            assert (path, url) in known or (path, url.partition("?")[0]) in known, f"{path}: {url} leads nowhere"
            resolved[leads_to(path, url)] -= 1
    assert not +resolved and not -resolved, f"{path}: {+resolved} {-resolved}"
    return len(new)


def leads_to(path: str, url: str) -> str:
    """The path a relative URL has from the root, by the standard library's reckoning."""
    from posixpath import dirname, join, normpath

    return normpath(join("/", dirname(path), unquote(re.split("[?#]", url)[0]))).lstrip("/")


def styles(path: Path) -> list[str]:
    """What a style sheet refers to; the source's and the output's are read alike."""
    return [ref.url for ref in css.find_references(path.read_bytes())]


def lexed(modules: Path, files: list[Path]) -> list[list[str] | None]:
    script = modules.parent / "imports.mjs"
    shutil.copy(PACKAGES / "imports.mjs", script)
    asked = "\n".join(str(file) for file in files)
    done = subprocess.run(["node", script], input=asked, capture_output=True, text=True, check=True)
    return [json.loads(line)["found"] for line in done.stdout.splitlines()]


def copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        for path in sorted(source.glob(name)):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def with_policy(page: Path) -> None:
    text = page.read_text()
    page.write_text(
        re.sub("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{CSP}">', text, count=1)
    )


async def test_pages_of_swagger_ui_and_katex_are_shown_without_an_error(
    modules, workshop: Workshop, start_edge, tmp_path
):
    swagger, katex = workshop.source / "swagger", workshop.source / "katex"
    copy(
        modules / "swagger-ui-dist", swagger, "*.html", "*.css", "*.png", "swagger-initializer.js", "oauth2-redirect.js"
    )
    copy(modules / "swagger-ui-dist", swagger, "swagger-ui-bundle.js", "swagger-ui-standalone-preset.js")
    initializer = (swagger / "swagger-initializer.js").read_text()
    (swagger / "swagger-initializer.js").write_text(
        re.sub(r'url: "[^"]*"', 'url: "openapi.json", validatorUrl: null', initializer)
    )
    paths = {"/things": {"get": {"summary": "List them", "responses": {"200": {"description": "They are."}}}}}
    (swagger / "openapi.json").write_text(
        json.dumps({"openapi": "3.0.3", "info": {"title": "Things", "version": "1"}, "paths": paths})
    )
    with_policy(swagger / "index.html")
    copy(modules / "katex/dist", katex, "katex.css", "katex.mjs", "fonts/*", "contrib/auto-render.mjs")
    (katex / "page.js").write_text(
        "import katex from './katex.mjs';\n"
        "import renderMathInElement from './contrib/auto-render.mjs';\n"
        "katex.render('\\\\int_0^\\\\infty e^{-x^2}\\\\,dx = \\\\frac{\\\\sqrt\\\\pi}{2}', document.getElementById('one'));\n"
        "renderMathInElement(document.body);\n"
    )
    (katex / "page.html").write_text(
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>KaTeX</title>"
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="katex.css"></head>'
        '<body><p id=one></p><p id=two>\\(\\mathcal{L} = \\sum_{i} \\mathbb{R}_i\\)</p><script type="module" src="page.js"></script>'
    )
    with_policy(katex / "page.html")
    result = workshop.build()
    edge = await start_edge(origins=("http://127.0.0.1:9",), issuers=(), assets=workshop.out)
    async with browser() as chromium:
        async with chromium.page() as tab:
            await tab.goto(f"{edge.url}/cdn/swagger/index.html")
            await tab.wait("document.querySelector('.opblock-summary-path')")
            assert "/things" in await tab.evaluate("document.querySelector('.opblock-summary-path').textContent")
            await tab.screenshot(tmp_path / "swagger.png")
            assert_loaded(tab.responses, result, "swagger/swagger-ui-bundle.js", "swagger/swagger-ui.css")
            assert await tab.evaluate("document.querySelectorAll('script[integrity^=sha384]').length") == 3
            assert tab.trouble == []
        async with chromium.page() as tab:
            await tab.goto(f"{edge.url}/cdn/katex/page.html")
            await tab.wait("document.querySelectorAll('.katex-html').length == 2")
            await tab.evaluate("document.fonts.ready.then(() => 0)")
            await tab.screenshot(tmp_path / "katex.png")
            assert await tab.evaluate("document.fonts.check('16px KaTeX_Main')")
            assert_loaded(
                tab.responses, result, "katex/katex.mjs", "katex/katex.css", "katex/fonts/KaTeX_Main-Regular.woff2"
            )
            assert tab.trouble == []


def assert_loaded(answers: dict[str, tuple[int, dict[str, str]]], result: Result, *paths: str) -> None:
    """Nothing failed, and these came under the names that may be kept for a year, encoded where that is worth it."""
    assert {status for status, _ in answers.values()} <= {0, 200}
    for path in paths:
        asset = result.manifest.files[path]
        [headers] = [headers for url, (_, headers) in answers.items() if url.endswith("/cdn/" + asset.file)]
        assert "immutable" in headers["cache-control"]
        assert ("content-encoding" in headers) == bool(asset.encodings)


async def test_the_sample_that_comes_with_weft_is_shown_as_it_should(workshop, start_edge, tmp_path):
    shutil.copytree(Path(__file__).parents[3] / "docs" / "sample", workshop.source, dirs_exist_ok=True)
    result = workshop.build(strict=True)
    edge = await start_edge(origins=("http://127.0.0.1:9",), issuers=(), assets=workshop.out)
    async with browser() as chromium, chromium.page() as tab:
        await tab.goto(f"{edge.url}/cdn/index.html")
        await tab.wait("document.querySelectorAll('#loaded li').length == 3")
        shown = await tab.evaluate("document.getElementById('loaded').textContent")
        for path in ("js/page.js", "img/threads.svg", "css/page.css"):
            assert result.manifest.files[path].file.rpartition("/")[2] in shown
        assert_loaded(tab.responses, result, "js/page.js", "js/names.js", "css/page.css", "css/tokens.css")
        await tab.screenshot(tmp_path / "sample.png")
        assert tab.trouble == []
