"""What counts as a reference, in each language, and what only looks like one."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.assets import css, javascript, pages
from edge.assets.kinds import is_hashed
from edge.assets.refs import Edit, Ref, Role, apply, respell, target_of, written
from edge.assets.sourcemap import find_map, moved


def urls(refs: object) -> list[str]:
    return [ref.url for ref in refs]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a { background: url(a.png) }", ["a.png"]),
        ("a { background: URL( 'a b.png' ) }", ["a b.png"]),
        (r"a { background: url(a\ b.png) }", ["a b.png"]),
        (r"a { background: u\72l(a.png) }", ["a.png"]),
        ('@import "a.css" layer(x);', ["a.css"]),
        ("@import url(a.css) screen;", ["a.css"]),
        (r'@\69mport "a.css";', ["a.css"]),
        ("@font-face { src: url(a.eot?#iefix) format('eot'), url(a.woff2) }", ["a.eot?#iefix", "a.woff2"]),
        ('a { background: image-set("a.png" 1x, url(b.png) 2x) }', ["a.png", "b.png"]),
        ("@media print { @supports (x: y) { a { mask: url(a.svg#b) } } }", ["a.svg#b"]),
        ("a { --x: url(a.png) }", ["a.png"]),
        ("a { width: calc(1px + 2px); background: cross-fade(url(a.png), url(b.png)) }", ["a.png", "b.png"]),
        ("/* url(no.png) @import 'no.css'; */", []),
        ('a::before { content: "url(no.png)" }', []),
        ("@charset 'utf-8'; @namespace 'no';", []),
        ("a { src: attr(data-url); font: 'a.css' }", []),
        ("a { background: url(a.png", ["a.png"]),
        ("a { background: url(a\n.png) ; mask: url(b.png) }", ["b.png"]),
    ],
)
def test_style_sheets(source, found):
    assert urls(css.find_references(source.encode())) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('import "./a.js"', ["./a.js"]),
        ("import a, { b as c } from './a.js'", ["./a.js"]),
        ("export * from './a.js'; export { b } from './b.js'", ["./a.js", "./b.js"]),
        ("import('./a.js'); import(`./b.js`)", ["./a.js", "./b.js"]),
        ("import(`./${name}.js`); import(name)", []),
        ('import data from "./a.json" with { type: "json" }', ["./a.json"]),
        ("new URL('a.png', import.meta.url)", ["a.png"]),
        ("new Worker(new URL('w.js', import.meta.url), { type: 'module' })", ["w.js"]),
        ("import.meta.resolve('./a.js')", ["./a.js"]),
        ("importScripts('a.js', 'b.js')", ["a.js", "b.js"]),
        (r"import './\x61\u{2e}js'", ["./a.js"]),
        ("new URL('no.png', location.href); import.meta.other('no')", []),
        ("new Other('no', import.meta.url)", []),
        ("// import './no.js'", []),
        ("const s = \"import './no.js'\", r = /import '.\\/no.js'/", []),
        ("`${import('./a.js')} import './no.js'`", ["./a.js"]),
        ("self.importScripts(name)", []),
    ],
)
def test_scripts(source, found):
    script = javascript.scan(source.encode())
    assert (urls(script.refs), script.lost_at) == (found, 0)


def test_a_script_that_is_none_says_where():
    assert javascript.scan(b"import './a.js';\n\nlet = = 1;").lost_at == 3
    assert javascript.scan(b"import './a.js';\n\nlet = = 1;").refs == ()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('<link rel="stylesheet" href="a.css"><script src=a.js></script>', ["a.css", "a.js"]),
        ("<img src='a&amp;b.png' srcset='a.png 1x, b,c.png 2x'>", ["a&b.png", "a.png", "b,c.png"]),
        ("<picture><source srcset=a.avif><img src=a.png></picture>", ["a.avif", "a.png"]),
        ("<video src=a.mp4 poster=a.jpg><track src=a.vtt></video>", ["a.mp4", "a.jpg", "a.vtt"]),
        ("<svg><use href='s.svg#x'/><image xlink:href='a.png'/></svg>", ["s.svg#x", "a.png"]),
        ("<a href=other.html>x</a><iframe src=f.html></iframe>", ["other.html", "f.html"]),
        ("<template><img src=a.png><template><img src=b.png></template></template>", ["a.png", "b.png"]),
        ("<img srcset='a.png?x=1&amp;y=2 1x, b.png?x=1&copy=2 2x'>", ["a.png?x=1&y=2", "b.png?x=1&copy=2"]),
        ("<p style='background:url(&quot;a&amp;b.png&#34;)'>", ["a&b.png"]),
        ("<img src='a.png?x=1&amp&ampx&notit;&copy'>", ["a.png?x=1&&ampx&notit;©"]),
        ("<noscript><img src=a.png></noscript>", ["a.png"]),
        ("<style>a{background:url(a.png)}</style><p style=\"background:url('b.png')\">", ["a.png", "b.png"]),
        ('<script type="module">import "./a.js"</script>', ["./a.js"]),
        (
            '<script type="importmap">{"imports":{"x":"./x.js"},"scopes":{"/":{"y":"./y.js"}}}</script>',
            ["./x.js", "./y.js"],
        ),
        ("<!-- <img src=no.png> --><textarea><img src=no.png></textarea>", []),
        ("<script>const s = '<img src=no.png>'</script><title><img src=no></title>", []),
        ("<script><!-- <script> </script> <img src=no.png> --></script><img src=a.png>", ["a.png"]),
        ("<img src=a.png src=no.png>", ["a.png"]),
        ("<IMG SRC=a.png/><img alt='>' src = 'b.png'>", ["a.png/", "b.png"]),
        ("<script type='text/template'><img src=no.png></script>", []),
        ("<table><img src=a.png><tr><td><img src=b.png></table>", ["a.png", "b.png"]),
        ("<img alt=x", []),
        ("<script type=module integrity='sha384-x' src=a.js></script>", ["a.js"]),
    ],
)
def test_pages(source, found):
    page = pages.scan(b"<!doctype html><title>x</title>" + source.encode())
    assert (urls(page.refs), page.differs) == (found, False)


def test_a_page_that_browsers_read_otherwise_is_left_alone():
    page = pages.scan(b"<!doctype html><select><img src=a.png></select><frameset><img src=b.png>")
    assert page.differs == bool(not page.refs)
    page = pages.scan(
        b"<!doctype html><body><frame src=a.html><img src=b.png>"
    )  # a frame outside a frameset is dropped
    assert (page.differs, page.refs) == (True, ())


def test_srcsets_are_cut_as_browsers_cut_them():
    value = "a.png, b,c.png 2x, data:,x 1x ,d.png 100w, e.png calc(1, 2) , f.png,"
    assert [value[start:stop] for start, stop in pages.srcset_urls(value)] == [
        *("a.png", "b,c.png", "data:,x", "d.png", "e.png", "f.png")
    ]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("b.png", "css/b.png"),
        ("./b.png?x#y", "css/b.png"),
        ("../img/b%20c.png", "img/b c.png"),
        ("/cdn/img/b.png", "img/b.png"),
        ("/img/b.png", "img/b.png"),
        ("../../up.png", "../up.png"),
        (" b.png\n", "css/b.png"),
        ("..\\img\\b.png", "img/b.png"),
        ("data:image/png;base64,x", None),
        ("https://example.com/b.png", None),
        ("//example.com/b.png", None),
        ("#x", None),
        ("", None),
        ("?x", None),
        ("dir/", None),
        ("%ff", None),
    ],
)
def test_where_a_url_leads(url, path):
    target = target_of(url, "css/a.css", "/cdn/")
    assert (target and target.path) == path


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="/\\?#%\0"), min_size=1, max_size=8).filter(
        lambda name: name not in (".", "..") and name.strip() == name and ":" not in name
    ),
    st.sampled_from(["", "?v=1&w=2", "#a'b\"c", "?x=<y>`"]),
)
@settings(max_examples=40)
def test_what_is_written_leads_to_what_was_built(name, suffix):
    """Into a style sheet, a script and a page, and out again by their parsers."""
    url = "./" + quote(name, safe="") + suffix
    target = target_of(url, "page.html", "/cdn/")
    assert target is not None
    out = name + ".hash0.x"
    spelt = respell(url, target, out, "/cdn/")
    for ref, before, after, scan in (
        (Ref(0, 0, url, Role.URL, 1, quoted=False), "a{b:url(", ")}", css.find_references),
        (Ref(0, 0, url, Role.URL, 1), 'a{b:url("', '")}', css.find_references),
        (Ref(0, 0, url, Role.IMPORT, 1), 'import "', '"', lambda text: javascript.scan(text).refs),
        (Ref(0, 0, url, Role.IMPORT, 1), "import '", "'", lambda text: javascript.scan(text).refs),
        (Ref(0, 0, url, Role.SUBRESOURCE, 1, in_html=True), '<img src="', '">', lambda text: pages.scan(text).refs),
        (Ref(0, 0, url, Role.SUBRESOURCE, 1, in_html=True), "<img src=", ">", lambda text: pages.scan(text).refs),
        (
            Ref(0, 0, url, Role.SUBRESOURCE, 1, in_html=True),
            "<img srcset='",
            " 1x'>",
            lambda text: pages.scan(text).refs,
        ),
    ):
        [found] = scan(before.encode() + written(spelt, ref) + after.encode())
        again = target_of(found.url, "page.html", "/cdn/")
        assert again is not None and again.path == out


@given(st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9), st.binary(max_size=9))), st.randoms())
def test_edits_change_what_they_name_and_nothing_else(pieces, rng):
    """Of each piece the first part stays, the second becomes the third."""
    source, edits = b"", []
    for kept, old, new in pieces:
        start = len(source) + len(kept)
        source += kept + old
        edits.append(Edit(start, start + len(old), new))
    rng.shuffle(edits)
    if all(old for _, old, _ in pieces):
        assert apply(source, edits) == b"".join(kept + new for kept, _, new in pieces)


def test_edits_that_overlap_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        apply(b"0123456789", [Edit(2, 5, b""), Edit(4, 6, b"")])


def test_the_last_comment_names_the_map():
    assert find_map(b"x\n//# sourceMappingURL=a.map\n").url == "a.map"
    assert find_map(b"x{}/*# sourceMappingURL=a.map */").url == "a.map"
    assert find_map(b"//# sourceMappingURL=a.map\n/* end */ // of it\n").url == "a.map"
    assert find_map(b"//# sourceMappingURL=a.map\nx()") is None
    assert find_map(b"const s = '//# sourceMappingURL=a.map'; s()") is None


def test_a_map_moves_with_what_is_behind_an_edit_on_its_line():
    # Columns 0, 10 and 20 of the first line, 4 of the second.
    source = "0123456789é12345678901234\n0123456789".encode()
    map_of = b'{"version":3,"sources":["a"],"names":[],"mappings":"AAAA,UAAU,UAAU;IAAA"}'
    assert moved(map_of, source, [Edit(2, 4, b"xxxxx")]).count(b"AAAA,aAAU,UAAU;IAAA") == 1
    assert moved(map_of, source, [Edit(14, 16, b"xxxxx")]).count(b"AAAA,UAAU,aAAU;IAAA") == 1
    assert moved(map_of, source, [Edit(27, 29, b"x")]).count(b"AAAA,UAAU,UAAU;GAAA") == 1
    assert moved(map_of, source, [Edit(0, 2, b"xx")]) == map_of


@pytest.mark.parametrize(
    ("name", "hashed"),
    [
        ("app.3f2a1b9c.js", True),
        ("app.5d41402abc4b2a76b9719d911017c592.css", True),
        ("chunk-QX7KLP2M.js", True),
        ("index-DfG3x9Ab.js", True),
        ("x.3f2a1b9c.js.map", True),
        ("deadbeef.js", False),
        ("foo-Version2.js", False),
        ("bootstrap-grid.css", False),
        ("inter-20240101.woff2", False),
        ("jquery-3.7.1.min.js", False),
        ("font-Regular400.ttf", False),
        ("app.js", False),
    ],
)
def test_a_hash_in_a_name_is_seen_and_words_and_dates_are_none(name, hashed):
    assert is_hashed("dir/" + name) is hashed
