"""Who refers to whom: every reference resolved, every one that leads nowhere said, and an order in which names can be
made.

Promise: a reference that a browser would not find is an issue with file and line, an error where the page or style
sheet is certainly broken (relative, or in CSS), else a warning; files that refer to each other in a circle come
together. Left to others: names and bytes (`link.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec import Struct

from edge.assets.kinds import Kind, is_hashed, kind_of
from edge.assets.refs import Ref, Role, Target, target_of
from edge.assets.scan import Scanned


class Severity(Enum):
    ERROR = "error"
    WARNING = "warning"


class Issue(Struct, frozen=True):
    severity: Severity
    code: str
    path: str
    line: int
    text: str


class Link(Struct, frozen=True):
    """A reference to a file that is there."""

    ref: Ref
    target: Target


@dataclass(slots=True)
class Node:
    """One source file."""

    path: str
    digest: str
    size: int
    scanned: Scanned
    links: list[Link] = field(default_factory=list[Link])
    owner: str = ""
    """For a source map: the file that it is of."""

    @property
    def is_page(self) -> bool:
        """Keeps its name in references: it is where people come in."""
        return kind_of(self.path) is Kind.HTML

    @property
    def keeps_name(self) -> bool:
        """The name carries a hash already, so the bytes must stay what they are."""
        return is_hashed(self.path) and not self.is_page


def resolve(nodes: Mapping[str, Node], base: str) -> list[Issue]:
    """Fill in the links of all nodes; what is wrong, in order of file and line."""
    issues: list[Issue] = []
    mapped = {name for node in nodes.values() for name in node.scanned.mapped}
    for path in sorted(nodes):
        node = nodes[path]
        issues += _own_issues(node)
        start, elsewhere = _start(node, base)
        for ref in node.scanned.refs:
            if ref.role is Role.IMPORT and _is_bare(ref.url):
                if not _is_mapped(ref.url, mapped):
                    text = f"{ref.url!r} is a bare specifier that no import map resolves"
                    issues.append(Issue(Severity.WARNING, "bare-specifier", path, ref.line, text))
                continue
            target = target_of(ref.url, path, base, start)
            if target is None or (elsewhere and not target.absolute):
                continue
            if target.path in nodes:
                node.links.append(Link(ref, target))
                if ref.role is Role.MAP and not node.keeps_name:
                    _own(nodes[target.path], node, issues, ref)
            else:
                issues.append(_missing(node, ref, target))
    return sorted(issues, key=lambda issue: (issue.path, issue.line, issue.text))


def order(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components, each behind those it has edges to (Tarjan's, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    done: list[list[str]] = []
    for root in sorted(edges):
        if root in index:
            continue
        work = [(root, iter(sorted(set(edges[root]))))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for below in rest:
                if below not in index:
                    index[below] = low[below] = len(index)
                    stack.append(below)
                    on_stack.add(below)
                    work.append((below, iter(sorted(set(edges[below])))))
                    break
                if below in on_stack:
                    low[node] = min(low[node], index[below])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component: list[str] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    done.append(sorted(component))
    return done


def _own_issues(node: Node) -> list[Issue]:
    issues = [
        Issue(Severity.WARNING, "unparsed-script", node.path, line, "the script can't be parsed; it stays as it is")
        for line in node.scanned.unparsed
    ]
    if node.scanned.differs:
        text = "not UTF-8, or markup that browsers understand otherwise; its references stay as they are"
        issues.append(Issue(Severity.WARNING, "unclear", node.path, 1, text))
    return issues


def _start(node: Node, base: str) -> tuple[Target | None, bool]:
    """Where a page's relative references start, if it says so; and whether that is another site."""
    url = node.scanned.folder_url
    if url is None or not url.strip():
        return None, False
    # A name to resolve in that folder, taken off again.
    target = target_of(url[: url.rfind("/") + 1] + "x", node.path, base)
    if target is None:
        return None, True
    return Target(target.path.rpartition("/")[0], target.absolute, target.under_base), False


def _own(source_map: Node, node: Node, issues: list[Issue], ref: Ref) -> None:
    if source_map.owner and source_map.owner != node.path:
        text = f"{source_map.path} is the source map of {source_map.owner} as well; it stays as it is"
        issues.append(Issue(Severity.WARNING, "shared-map", node.path, ref.line, text))
        source_map.owner = "\0"
    elif source_map.owner != "\0" and kind_of(source_map.path) is Kind.MAP:
        source_map.owner = node.path


def _is_bare(url: str) -> bool:
    return not url.startswith(("/", "./", "../")) and ":" not in url


def _is_mapped(url: str, mapped: set[str]) -> bool:
    return url in mapped or any(name.endswith("/") and url.startswith(name) for name in mapped)


def _missing(node: Node, ref: Ref, target: Target) -> Issue:
    text = f"{ref.url!r} leads to {target.path!r}, which is not there"
    kind = kind_of(node.path)
    if ref.role is Role.MAP:
        return Issue(Severity.WARNING, "missing-map", node.path, ref.line, text)
    if target.absolute:
        return Issue(Severity.WARNING, "missing-absolute", node.path, ref.line, text)
    certain = ref.role in (Role.URL, Role.SUBRESOURCE) and kind in (Kind.CSS, Kind.HTML)
    return Issue(Severity.ERROR if certain else Severity.WARNING, "missing", node.path, ref.line, text)
