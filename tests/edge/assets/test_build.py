"""Builds: what is refused, what is rewritten, what a change touches, and that nothing else decides what comes out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import brotli
import pytest
import zstandard

from edge.assets import build as building
from edge.assets import encode as encoding
from edge.assets import manifest as manifests
from edge.assets.build import BrokenReferences, BuildError, Options, build
from edge.assets.link import CollisionError
from tests.edge.assets.conftest import SITE, TEXT, Workshop, tree

ROOT = Path(__file__).parents[3]
PROGRAM = (
    "from edge.assets.cli import assets_command; from infra.cli import main, weft; "
    "weft.add_command(assets_command); main()"
)


def broken(workshop: Workshop, site: dict[str, str | bytes], **options: object) -> list[tuple[str, int, str]]:
    with pytest.raises(BrokenReferences) as caught:
        workshop.build(site, **options)
    return [(issue.path, issue.line, issue.code) for issue in caught.value.issues]


def warned(workshop: Workshop, site: dict[str, str | bytes]) -> list[tuple[str, int, str]]:
    return [(issue.path, issue.line, issue.code) for issue in workshop.build(site).issues]


def test_every_reference_leads_to_what_was_built(workshop):
    result = workshop.build(SITE)
    files = {path: asset.file for path, asset in result.manifest.files.items()}
    names = {path: file.rpartition("/")[2] for path, file in files.items()}
    page = workshop.text(result, "index.html")
    assert f'href="{files["css/app.css"]}"' in page
    assert f'src="{files["js/app.js"]}"' in page
    style = workshop.text(result, "css/app.css")
    assert names["css/base.css"] in style
    assert f"../img/{names['img/a.svg']}" in style
    script = workshop.text(result, "js/app.js")
    assert f'"./{names["js/b.js"]}"' in script
    assert f'"../img/{names["img/a.svg"]}"' in script


def test_a_name_is_the_hash_of_the_final_bytes(workshop):
    result = workshop.build(SITE)
    for path, asset in result.manifest.files.items():
        data = (workshop.out / asset.file).read_bytes()
        digest = hashlib.sha256(data)
        stem, extension = path.rsplit(".", 1)
        assert asset.file == f"{stem}.{base64.b32encode(digest.digest())[:16].decode().lower()}.{extension}"
        assert (asset.sha256, asset.size) == (digest.hexdigest(), len(data))
        assert asset.integrity == "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()


def test_pages_pin_what_they_load(workshop):
    result = workshop.build(
        {
            **SITE,
            "index.html": "<!doctype html><link rel=stylesheet href=css/app.css>"
            '<script type=module src="js/app.js" integrity="sha384-old"></script><img src=img/a.svg>'
            "<link rel=preload as=image href=img/a.svg><script src=https://example.com/x.js integrity=sha384-y></script>",
        }
    )
    files = result.manifest.files
    page = workshop.text(result, "index.html")
    assert (
        f'<link integrity="{files["css/app.css"].integrity}" rel=stylesheet href={files["css/app.css"].file}>' in page
    )
    assert f'src="{files["js/app.js"].file}" integrity="{files["js/app.js"].integrity}">' in page
    assert page.count("integrity") == 3
    assert "integrity=sha384-y" in page
    assert "crossorigin" not in page


def test_what_comes_from_another_host_is_asked_for_without_credentials(workshop):
    result = workshop.build({**SITE, "index.html": "<script src=/js/b.js></script>"}, base="https://cdn.example/x/")
    asset = result.manifest.files["js/b.js"]
    page = workshop.text(result, "index.html")
    assert f'crossorigin="anonymous" src=https://cdn.example/x/{asset.file}>' in page


def test_encodings_decode_to_the_file_and_are_smaller(workshop):
    result = workshop.build(
        {**SITE, "tiny.txt": "x", "random.bin": os.urandom(5000), "a.png": b"\x89PNG" + bytes(3000)}
    )
    for asset in result.manifest.files.values():
        data = (workshop.out / asset.file).read_bytes()
        for coding, suffix in encoding.SUFFIXES.items():
            sibling = workshop.out / (asset.file + suffix)
            assert sibling.exists() == (coding in asset.encodings)
            if sibling.exists():
                encoded = sibling.read_bytes()
                assert encoding.decode(encoded, coding) == data
                assert len(encoded) < len(data)
    assert set(result.manifest.files["js/b.js"].encodings) == {"br", "zstd", "gzip"}
    assert not result.manifest.files["random.bin"].encodings
    assert not result.manifest.files["a.png"].encodings
    style = (workshop.out / (result.manifest.files["js/b.js"].file + ".zst")).read_bytes()
    assert zstandard.get_frame_parameters(style).window_size <= 8 << 20
    gzip = (workshop.out / (result.manifest.files["js/b.js"].file + ".gz")).read_bytes()
    assert gzip[:10] == b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"


def test_an_encoder_that_errs_stops_the_build(workshop, monkeypatch):
    monkeypatch.setitem(encoding._ENCODERS, "br", lambda data: brotli.compress(data[:-1]))
    with pytest.raises(encoding.EncodingError):
        workshop.build(SITE)
    assert not (workshop.out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("site", "found"),
    [
        ({"a.css": "\n\nb { background: url(no.png) }"}, ("a.css", 3, "missing")),
        ({"a.css": "b{}\n@import 'no.css';"}, ("a.css", 2, "missing")),
        ({"d/a.css": "b { background: url(../../x.png) }"}, ("d/a.css", 1, "missing")),
        ({"a.html": "<p>\n<img\nsrc=no.png>"}, ("a.html", 3, "missing")),
        ({"a.html": "<img srcset='no.png 2x'>"}, ("a.html", 1, "missing")),
        ({"a.html": "<style>\na{background:url(no.png)}</style>"}, ("a.html", 2, "missing")),
        ({"a.html": "<script src=no.js></script>"}, ("a.html", 1, "missing")),
    ],
)
def test_a_broken_reference_is_an_error_with_its_place_and_nothing_is_written(workshop, site, found):
    assert broken(workshop, site) == [found]
    assert not workshop.out.exists()


@pytest.mark.parametrize(
    ("site", "found"),
    [
        ({"a.html": "\n<img src=/no.png>"}, ("a.html", 2, "missing-absolute")),
        ({"a.css": "a { background: url(/no.png) }"}, ("a.css", 1, "missing-absolute")),
        ({"a.js": "x()\nimport 'lodash'"}, ("a.js", 2, "bare-specifier")),
        ({"a.js": "import './no.js'"}, ("a.js", 1, "missing")),
        ({"a.js": "x()\n//# sourceMappingURL=no.map"}, ("a.js", 2, "missing-map")),
        ({"a.css": "a {}\n/*# sourceMappingURL=no.map */"}, ("a.css", 2, "missing-map")),
        ({"a.js": "import './b.js'; let = = 2", "b.js": ""}, ("a.js", 1, "unparsed-script")),
        ({"a.css": b"/* \xe9 */ a { background: url(a.css) }"}, ("a.css", 1, "unclear")),
        ({"a.html": b"<img src=\xe9.png>"}, ("a.html", 1, "unclear")),
        ({"a.html": "<frame src=a.html>"}, ("a.html", 1, "unclear")),
        ({"a.html": "<a href=no.html>x</a>"}, ("a.html", 1, "missing")),
        ({"a.js": "x()\n//# sourceMappingURL=a.js.map", "a.js.map": "{}"}, None),
    ],
)
def test_what_may_be_meant_otherwise_is_a_warning_unless_strict(workshop, site, found):
    assert warned(workshop, site) == ([found] if found else [])
    if found:
        assert broken(workshop, site, strict=True) == [found]


def test_import_maps_resolve_bare_specifiers(workshop):
    page = '<script type="importmap">{"imports": {"lib": "./lib.js", "kit/": "./kit/"}}</script><script type=module src=a.js></script>'
    result = workshop.build(
        {"i.html": page, "lib.js": "export {}", "a.js": "import 'lib'; import 'kit/x.js'", "kit/x.js": ""}
    )
    assert not result.issues
    assert f'"lib": "./{result.manifest.files["lib.js"].file}"' in workshop.text(result, "i.html")


def test_queries_fragments_and_escapes_stay(workshop):
    result = workshop.build(
        {
            "f/a b.svg": "<svg/>",
            "a.css": r"a{background:url(f/a\ b.svg?v=1#x)} b{background:url('f/a%20b.svg#iefix')}",
            "a.html": "<img src='f/a b.svg?v=1&amp;w=2#y'>",
        }
    )
    name = result.manifest.files["f/a b.svg"].file.replace(" ", "%20").replace("f/a%20b", "f/a%20b")
    style = workshop.text(result, "a.css")
    assert f"url(f/{name[2:]}?v=1#x)" in style.replace("a%20b", "a%20b")
    assert f"{name[2:]}#iefix" in style
    assert f"{name[2:]}?v=1&amp;w=2#y'" in workshop.text(result, "a.html")


def test_a_base_that_is_the_root_of_the_site_makes_references_absolute(workshop):
    result = workshop.build({"d/a.html": "<base href='/'><img src='x.svg'>", "x.svg": "<svg/>"})
    assert f"src='/cdn/{result.manifest.files['x.svg'].file}'" in workshop.text(result, "d/a.html")


def test_files_that_refer_to_each_other_are_named_together(workshop):
    site = {
        "a.js": f"import {{ b }} from './b.js'; export const a = () => b; // {TEXT}",
        "b.js": "import { c } from './c.js'; export const b = () => c;",
        "c.js": "import { a } from './a.js'; export const c = () => a; import './leaf.js'",
        "self.js": "import * as self from './self.js'; export { self };",
        "leaf.js": "export {}; /* 1 */",
        "user.js": "import './a.js'",
    }
    first = workshop.build(site)
    for path, below in (
        ("a.js", "b.js"),
        ("b.js", "c.js"),
        ("c.js", "a.js"),
        ("self.js", "self.js"),
        ("user.js", "a.js"),
    ):
        assert first.manifest.files[below].file in workshop.text(first, path)
    second = workshop.build({"b.js": "import { c } from './c.js'; export const b = () => [c];"})
    changed = {path for path in site if first.manifest.files[path].file != second.manifest.files[path].file}
    assert changed == {"a.js", "b.js", "c.js", "user.js"}
    third = workshop.build({"b.js": site["b.js"]})
    assert third.manifest == first.manifest


def test_touching_a_file_renames_it_and_exactly_what_refers_to_it(workshop):
    first = workshop.build(SITE)
    second = workshop.build({"css/base.css": "a { color: blue }"})
    changed = {path for path in SITE if first.manifest.files[path] != second.manifest.files[path]}
    assert changed == {"css/base.css", "css/app.css", "index.html"}
    assert second.files_encoded <= 3


def test_a_build_with_nothing_changed_touches_no_file(workshop):
    first = workshop.build(SITE)
    before = {path: path.stat() for path in workshop.out.rglob("*")}
    second = workshop.build()
    assert (second.files_written, second.files_removed, second.files_encoded) == (0, 0, 0)
    assert {path: path.stat() for path in workshop.out.rglob("*")} == before
    assert second.manifest == first.manifest


def test_what_was_damaged_in_the_output_is_mended(workshop):
    result = workshop.build(SITE)
    expected = workshop.tree()
    asset = result.manifest.files["js/b.js"]
    (workshop.out / asset.file).write_bytes(b"x" * asset.size)
    (workshop.out / (asset.file + ".br")).unlink()
    os.utime(workshop.out / asset.file, ns=(1, 1))
    workshop.build()
    assert workshop.tree() == expected


def test_a_cache_that_was_damaged_is_not_believed(workshop):
    workshop.build(SITE)
    expected = workshop.tree()
    for path in (workshop.cache / "blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)
    for path in workshop.out.rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(BuildError, match="build again"):
        workshop.build()
    for path in workshop.cache.glob("*.sqlite*"):
        path.write_bytes(b"no database")
    for path in (workshop.cache / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    workshop.build()
    assert workshop.tree() == expected


def test_a_text_that_was_damaged_in_the_cache_is_not_built_upon(workshop):
    """Nothing else would see it: its hash is that of what is made of it now."""
    workshop.build({"a.js": f"import './b.js';  x();  // {TEXT}\n", "b.js": ""})
    for path in (workshop.cache / "blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"x();", b"y();"))
    with pytest.raises(BuildError, match="build again"):
        workshop.build({"b.js": "export {}"})


def test_the_output_depends_on_nothing_else(tmp_path, workshops):
    """Another path, another number of workers, another hash seed, no cache, files made in another order."""
    expected = None
    more = {f"m/{index}.js": f"export default {index}; // {TEXT * 40}" for index in range(60)}
    site = {**SITE, **more, "m/all.js": "".join(f"import './{index}.js';" for index in range(60))}
    for seed, workers in ((0, 1), (1, 2), (2, 3)):
        workshop = workshops(f"some{'where' * seed}")
        workshop.write(dict(sorted(site.items(), reverse=seed == 1)))
        subprocess.run(
            (sys.executable, "-c", PROGRAM, "assets", "build", workshop.source, workshop.out, "--json")
            + ("--cache", workshop.cache, "--workers", str(workers)),
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.DEVNULL,
        )
        expected = expected or workshop.tree()
        assert workshop.tree() == expected


def test_names_that_carry_a_hash_keep_it_and_their_bytes(workshop):
    script = "import './b.js';  /* not minified either */  export {}"
    result = workshop.build(
        {"chunk.3f2a1b9c.js": script, "b.js": "", "a.html": "<script src=chunk.3f2a1b9c.js></script>"}
    )
    asset = result.manifest.files["chunk.3f2a1b9c.js"]
    assert asset.file == "chunk.3f2a1b9c.js"
    assert workshop.text(result, "chunk.3f2a1b9c.js") == script
    page = workshop.text(result, "a.html")
    assert f'<script integrity="{asset.integrity}" src=chunk.3f2a1b9c.js>' in page


def test_two_contents_for_one_name_are_an_error(workshop, monkeypatch):
    monkeypatch.setattr("edge.assets.link._mark", lambda digest: "3f2a1b9c3f2a1b9c")
    with pytest.raises(CollisionError):
        workshop.build({"a.js": "a()", "a.3f2a1b9c3f2a1b9c.js": "b()"})
    assert not (workshop.out / "manifest.json").exists()


def test_licences_stay_and_so_do_files_whose_map_would_not_fit(workshop):
    mapped = "const a  =  1;\nimport './b.js';  a();\n//# sourceMappingURL=m.js.map\n"
    map_of = json.dumps({"version": 3, "sources": ["m.ts"], "names": [], "mappings": "AAAA;AACA,kBAAkB;AAAA"})
    result = workshop.build(
        {
            "bang.js": "/*! licence */\nconst   a = 1;  /* no */ console.log(a)",
            "word.js": "/** @license MIT */\nconst   a = 1;",
            "m.js": mapped,
            "m.js.map": map_of,
            "b.js": "export {}",
            "x.min.js": "const   a = 1;",
        }
    )
    assert "licence" in workshop.text(result, "bang.js")
    assert "/* no */" not in workshop.text(result, "bang.js")
    assert "@license MIT" in workshop.text(result, "word.js")
    assert workshop.text(result, "x.min.js") == "const   a = 1;"
    built = workshop.text(result, "m.js")
    assert built.startswith("const a  =  1;\n")
    assert f"sourceMappingURL={result.manifest.files['m.js.map'].file}" in built
    # `a()` moved by the 17 characters that the name of b.js grew.
    moved = json.loads(workshop.text(result, "m.js.map"))["mappings"]
    assert moved != json.loads(map_of)["mappings"]
    column = built.split("\n")[1].index("a()")
    assert decoded(moved)[1] == [0, column]
    assert decoded(json.loads(map_of)["mappings"])[1] == [0, mapped.split("\n")[1].index("a()")]


def decoded(mappings: str) -> list[list[int]]:
    """Columns by line, by another reading of ECMA-426 than the product's."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    lines = []
    for line in mappings.split(";"):
        column, columns = 0, []
        for segment in filter(None, line.split(",")):
            bits = ""
            for digit in segment:
                value = alphabet.index(digit)
                bits = f"{value & 31:05b}" + bits
                if value < 32:
                    break
            number = int(bits, 2)
            column += -(number >> 1) if number & 1 else number >> 1
            columns.append(column)
        lines.append(columns)
    return lines


@pytest.mark.parametrize("lost", [b"import './b.js';", b"x();", b" + ", b"'", b"\n"])
def test_a_smaller_script_that_is_read_otherwise_is_not_built(workshop, monkeypatch, lost):
    monkeypatch.setattr("edge.assets.minify._slim", lambda source, *_: source.replace(lost, b"").replace(b"  ", b""))
    script = f"import './b.js';\nx();  // {TEXT}\nlet a = 1\na + 'y'" + " " * 5000
    result = workshop.build({"a.js": script, "b.js": ""})
    name = result.manifest.files["b.js"].file
    assert workshop.text(result, "a.js") == script.replace("b.js", name)


@pytest.mark.parametrize("lost", [b"a", b"'x", b"url", b" b", b"{", b"@"])
def test_a_smaller_style_sheet_that_is_read_otherwise_is_not_built(workshop, monkeypatch, lost):
    monkeypatch.setattr("edge.assets.minify._slim", lambda source, *_: source.replace(lost, b"").replace(b"  ", b""))
    style = "@media print { a b { background: url(data:,); content: 'x' } }" + " " * 5000
    assert workshop.text(workshop.build({"a.css": style}), "a.css") == style


def test_a_build_that_ends_anywhere_leaves_what_was_there_whole(workshop, monkeypatch):
    first = workshop.build(SITE)
    before = workshop.tree()
    changed = {"js/b.js": f"export const b = 'new {TEXT}';", "css/base.css": "a { color: green }"}
    workshop.write(changed)
    real, at = os.replace, 0

    class Crash(BaseException):
        pass

    while True:
        left = at

        def replace(source: object, target: object) -> None:
            nonlocal left
            if str(target).startswith(str(workshop.out)):
                if left == 0:
                    raise Crash
                left -= 1
            real(source, target)

        monkeypatch.setattr(building.os, "replace", replace)
        try:
            workshop.build()
            break
        except Crash:
            at += 1
        now = workshop.tree()
        for name in manifests.files_of(first.manifest):
            assert now[name] == before[name]
        current = manifests.read(workshop.out)
        assert current is not None
        assert manifests.files_of(current) <= now.keys()
        # And pages under their own names refer to what is there.
        for loaded in re.findall(r'(?:href|src)="([^"]+)"', now["index.html"].decode()):
            assert loaded in now
    assert at > 5
    assert not [path for path in workshop.tree() if ".weft-new-" in path]


def test_releases_keep_their_files_for_as_many_builds_as_asked(workshop):
    built = [workshop.build({**SITE, "js/b.js": f"export const b = {number};"}, keep=2) for number in range(5)]
    names = [result.manifest.files["js/b.js"].file for result in built]
    there = [(workshop.out / name).exists() for name in names]
    assert there == [False, False, True, True, True]
    # Building the same again, or an old one, is no reason to drop another.
    again = workshop.build(keep=2)
    assert again.files_removed == 0
    back = workshop.build({"js/b.js": "export const b = 3;"}, keep=2)
    assert [(workshop.out / name).exists() for name in names] == [False, False, True, True, True]
    assert back.manifest == built[3].manifest
    workshop.build(keep=0)
    assert [(workshop.out / name).exists() for name in names] == [False, False, False, True, False]
    assert not (workshop.out / "releases.json").exists()


def test_a_page_that_is_gone_goes_with_its_release(workshop):
    workshop.build({**SITE, "old/page.html": "<p>old"})
    (workshop.source / "old/page.html").unlink()
    workshop.build(keep=0)
    assert not (workshop.out / "old").exists()
    assert (workshop.out / "index.html").exists()


def test_folders_inside_each_other_are_refused(workshop):
    workshop.write(SITE)
    for source, out, cache in (
        (workshop.source, workshop.source / "dist", workshop.cache),
        (workshop.source / "js", workshop.source, workshop.cache),
        (workshop.source, workshop.out, workshop.out / "cache"),
        (workshop.source, workshop.source, workshop.cache),
    ):
        with pytest.raises(BuildError):
            build(source, out, cache, Options())


def test_links_that_lead_out_are_refused_and_hidden_files_left_out(workshop):
    workshop.write({**SITE, ".git/config": "x", ".env": "SECRET", ".well-known/security.txt": "Contact: x"})
    result = workshop.build()
    assert not [path for path in result.manifest.files if "git" in path or "env" in path]
    assert ".well-known/security.txt" in result.manifest.files
    (workshop.root / "secret").write_text("x")
    (workshop.source / "link.txt").symlink_to(workshop.root / "secret")
    with pytest.raises(BuildError, match=r"link\.txt is a link that leads out"):
        workshop.build()


def test_the_command_reports_and_fails_as_it_should(workshop, tmp_path):
    workshop.write(SITE)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-c", PROGRAM, "assets", "build", str(workshop.source), str(workshop.out))
        environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
        return subprocess.run((*command, *more), cwd=ROOT, env=environ, capture_output=True, text=True)

    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["files"]["js/b.js"]["encodings"].keys() == {"br", "zstd", "gzip"}
    assert report["types"]["total"]["files"] == len(SITE)
    assert (tmp_path / "xdg" / "weft" / "assets").is_dir()
    workshop.write(
        {"js/b.js": f"export const b = '{TEXT * 3} and more';", "js/new.js": f"// {os.urandom(200).hex()}\nx()"}
    )
    shown = run("--files")
    assert "grew most" in shown.stdout
    assert "js/b.js" in shown.stdout.partition("grew most")[2]
    workshop.write({"css/app.css": "a {}\nb { background: url(no.png) }"})
    failed = run()
    assert failed.returncode == 1
    assert "css/app.css:2: 'no.png' leads to 'css/no.png', which is not there" in failed.stderr
    assert run("--base", "cdn").returncode == 2
    assert "Traceback" not in failed.stderr


def test_the_sources_of_a_build_are_only_read(workshop):
    workshop.write(SITE)
    before = tree(workshop.source)
    for path in workshop.source.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    workshop.build()
    assert tree(workshop.source) == before
