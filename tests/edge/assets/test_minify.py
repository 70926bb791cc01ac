"""What minifying leaves out, and what it must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.assets import css, javascript, minify

ROOM = "\n\n" + " " * 400
"""So that there is something to gain."""


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("let a = 1;  // no\nlet b = 2;", "let a = 1;let b = 2;"),
        ("let a = 1 // no\nlet b = 2", "let a = 1\nlet b = 2"),
        ("let a = 1 /* a\nb */\nlet b = 2", "let a = 1\nlet b = 2"),
        ("return_ (a, b) ;", "return_(a,b);"),
        ("if (a) {\n  b()\n}\nc()", "if(a){b()}\nc()"),
        ("a = b\n(c)", "a = b\n(c)"),
        ("a\n++b", "a\n++b"),
        ("x = a + +b - -c", "x = a + +b - -c"),
        ("s = 'a  b' + \"c  d\" + `e  ${ f }  g`", "s = 'a  b' + \"c  d\" + `e  ${ f }  g`"),
        ("r = /a  b[/]  c/g ;", "r = /a  b[/]  c/g;"),
        ("/*! licence */\nlet a = 1 ;", "/*! licence */\nlet a = 1;"),
        ("//! licence\n}".replace("}", "let a = 1 ;"), "//! licence\nlet a = 1;"),
        ("{ a() //! kept\n}", "{a()//! kept\n}"),
        ("/** @license MIT */ a()", "/** @license MIT */ a()"),
        ("#!/usr/bin/env node\nlet a = 1 ;", "#!/usr/bin/env node\nlet a = 1;"),
        ("a = b < !--c", "a = b < !--c"),
        ("for (;;) { a } ", "for(;;){a}"),
        ("do a ; while (b)\nc", "do a;while(b)\nc"),
        ("async\nfunction f() {}", "async\nfunction f(){}"),
        ("let a = '\\u005C' ;", "let a = '\\u005C';"),
    ],
)
def test_scripts(source, made):
    tree = javascript.parse((source + ROOM).encode())
    found = minify.script((source + ROOM).encode(), tree)
    assert found is not None
    assert found[0].decode() == made


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("a { color : red ; }", "a{color : red;}"),
        ("a  b , c > d { x: y }", "a b,c > d{x: y}"),
        ("/* no */ a { width: calc( 1px + 2px ) }", "a{width: calc( 1px + 2px )}"),
        ("/*! licence */ a { b: c }", "/*! licence */ a{b: c}"),
        ("a { content: 'x  ;  y' ; b: url( a  b.png ) }", "a{content: 'x  ;  y';b: url( a  b.png )}"),
        (".a\\ b { c: d }", ".a\\ b{c: d}"),
        ("a { b: c/* no */d }", "a{b: c d}"),
        ("a :hover { b: url(data:,a;b) }", "a :hover{b: url(data:,a;b)}"),
    ],
)
def test_style_sheets(source, made):
    whole = (source + ROOM).encode()
    found = minify.style(whole, css.Sheet(whole))
    # A comment between two tokens is no white space: that sheet stays as it is.
    assert (found and found[0].decode()) == (None if "c/* no */d" in source else made)


@given(st.text(st.sampled_from(" \n\t{}()[];,:'\"/*\\a1+-<>=!.`$#@"), max_size=60))
def test_whatever_comes_out_is_read_as_what_went_in(text):
    source = (text + ROOM).encode()
    tree = javascript.parse(source)
    if not tree.lost_at and (found := minify.script(source, tree)) is not None:
        assert javascript.parse(found[0]).shape() == tree.shape()
        again = minify.script(found[0] + ROOM.encode(), found[1])
        assert again is None or again[0] == found[0]
    made = minify.style(source, css.Sheet(source))
    assert made is None or css.Sheet(made[0]).tokens() == css.Sheet(source).tokens()
