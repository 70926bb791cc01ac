"""The console built: `web/` to `built/`, by the asset build that everybody else uses.

Promise: the output depends on the sources and the tools alone. It is made when the package is (`hatch_build.py`), so
that a running edge needs neither the sources nor the time. Left to others: the build itself (`edge.assets`), serving
(`serve.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edge.assets.build import Options, Result, build

SOURCES: Final = Path(__file__).parent / "web"
BUILT: Final = Path(__file__).parent / "built"


def build_console(out: Path, cache: Path) -> Result:
    """Build into `out`; `cache` remembers what was done before. BuildError and the like."""
    return build(SOURCES, out, cache, Options(keep=0))
