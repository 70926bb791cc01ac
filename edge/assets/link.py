"""Names that say what is in a file, all the way down: a file's hash covers the hashes of all that it refers to.

Promise: the hash is that of the final bytes, so that one name never stands for two contents, anywhere; where files
refer to each other in a circle, and no hash could hold itself, that of the whole circle with its own names left out,
so that any change in it renames all of it. Files whose names carry a hash keep name and bytes. A source map is kept
true to its file. Left to others: encodings and writing (`build.py`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from edge.assets.actions import Actions, key_of
from edge.assets.graph import Issue, Node, Severity, order
from edge.assets.refs import Edit, Role, Target, apply, respell, written
from edge.assets.sourcemap import MapError, moved

HASH_CHARS: Final = 16
"""80 bits, in base32."""
REVISION: Final = 1
_BLANK: Final = "0" * HASH_CHARS


class CollisionError(Exception):
    """Two contents would have one name."""


class Summary(Struct, frozen=True):
    """Of final bytes."""

    sha256: str
    size: int
    integrity: str


class Built(Struct, frozen=True):
    """A source file as it is built: its text, and what is changed in it last."""

    file: str
    text_digest: str
    edits: tuple[Edit, ...]
    summary: Summary


Read = Callable[[str], bytes]
"""The bytes of a digest."""


def out_name(path: str, mark: str) -> str:
    """`dir/name.ext` with `mark` before its extension."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    marked = f"{stem}.{mark}.{extension}" if dot and stem else f"{name}.{mark}"
    return folder + slash + marked


class Linker:
    """One build's names. `read` gives bytes by their digest, and is asked only for what is not remembered."""

    def __init__(self, nodes: Mapping[str, Node], base: str, actions: Actions, read: Read) -> None:
        self.built: dict[str, Built] = {}
        self.issues: list[Issue] = []
        self._nodes = nodes
        self._base = base
        self._host = base.find("//") >= 0
        self._actions = actions
        self._read = read
        self._moved: dict[str, str] = {}

    def run(self) -> None:
        """Fill `built`. CollisionError."""
        for node in self._nodes.values():
            if node.owner and node.owner in self._nodes:
                self._move_map(node, self._nodes[node.owner])
        edges = {path: self._below(node) for path, node in self._nodes.items()}
        for component in order(edges):
            if len(component) > 1 or component[0] in edges[component[0]]:
                self._circle(component)
            else:
                self._one(self._nodes[component[0]])
        self._check_names()

    def final(self, built: Built) -> bytes:
        """The bytes that `built` is."""
        return apply(self._read(built.text_digest), built.edits)

    def _below(self, node: Node) -> list[str]:
        """Whose names, or whose hash, are in the bytes of `node`."""
        if node.keeps_name:
            return []
        return [link.target.path for link in node.links if not self._nodes[link.target.path].is_page]

    def _one(self, node: Node) -> None:
        edits = self._edits(node, lambda path: self.built[path].file)
        text = self._text_of(node)
        summary = self._summary(text, edits)
        name = node.path if node.keeps_name else out_name(node.path, _mark(bytes.fromhex(summary.sha256)))
        self.built[node.path] = Built(name, text, edits, summary)

    def _circle(self, paths: list[str]) -> None:
        inner = {path: out_name(path, _BLANK) for path in paths}
        texts = {path: self._text_of(self._nodes[path]) for path in paths}
        material = [
            (path, texts[path], self._edits(self._nodes[path], lambda to: inner.get(to) or self.built[to].file))
            for path in paths
        ]
        whole = key_of("circle", REVISION, material)
        names = {path: out_name(path, _mark(hashlib.sha256(f"{whole} {path}".encode()).digest())) for path in paths}
        for path in paths:
            edits = self._edits(self._nodes[path], lambda to: names.get(to) or self.built[to].file)
            self.built[path] = Built(names[path], texts[path], edits, self._summary(texts[path], edits))

    def _edits(self, node: Node, name_of: Callable[[str], str]) -> tuple[Edit, ...]:
        if node.keeps_name:
            return ()
        edits: list[Edit] = []
        for ref, target in ((link.ref, link.target) for link in node.links):
            below = self._nodes[target.path]
            if below.is_page:
                continue
            if not below.keeps_name:
                url = respell(ref.url, target, name_of(target.path), self._base)
                edits.append(Edit(ref.start, ref.end, written(url, ref)))
            if ref.pin >= 0:
                integrity = f'integrity="{self.built[target.path].summary.integrity}"'
                # What comes from another host is checked only if it may be read (SRI §3.6).
                pin = integrity + ' crossorigin="anonymous"' if self._host and not ref.cors else integrity
                start, end = ref.pinned or (ref.pin, ref.pin)
                edits.append(Edit(start, end, (pin if ref.pinned else f" {pin}").encode()))
        return tuple(sorted(edits, key=lambda edit: (edit.start, edit.end)))

    def _move_map(self, node: Node, owner: Node) -> None:
        """The map as it is once its file's references are rewritten: all names have one length, so it need not wait."""
        edits = tuple(
            Edit(link.ref.start, link.ref.end, written(self._blank(link.ref.url, link.target), link.ref))
            for link in owner.links
            if link.ref.role is not Role.MAP and not self._nodes[link.target.path].keeps_name
            if not self._nodes[link.target.path].is_page
        )
        if not edits:
            return
        text = self._text_of(owner)
        key = key_of("map", REVISION, node.digest, text, edits)
        digest = self._actions.get(key, str)
        if digest is None or (digest != node.digest and not self._actions.blobs.has(digest)):
            try:
                digest = self._actions.blobs.put(moved(self._read(node.digest), self._read(text), edits))
            except MapError as exc:
                self.issues.append(Issue(Severity.WARNING, "odd-map", node.path, 1, f"{exc}; it stays as it is"))
                return
            self._actions.put(key, digest)
        if digest != node.digest:
            self._actions.used_blob(digest)
        self._moved[node.path] = digest

    def _blank(self, url: str, target: Target) -> str:
        return respell(url, target, out_name(target.path, _BLANK), self._base)

    def _text_of(self, node: Node) -> str:
        return self._moved.get(node.path) or node.scanned.text_digest or node.digest

    def _summary(self, text: str, edits: tuple[Edit, ...]) -> Summary:
        key = key_of("summary", text, edits)
        summary = self._actions.get(key, Summary)
        if summary is None:
            data = apply(self._read(text), edits)
            integrity = "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()
            summary = Summary(hashlib.sha256(data).hexdigest(), len(data), integrity)
            self._actions.put(key, summary)
        return summary

    def _check_names(self) -> None:
        taken: dict[str, str] = {}
        for path, built in sorted(self.built.items()):
            if taken.setdefault(built.file, path) != path:
                raise CollisionError(f"{path} and {taken[built.file]} would both be built as {built.file}")


def _mark(digest: bytes) -> str:
    return base64.b32encode(digest).decode().lower()[:HASH_CHARS]
