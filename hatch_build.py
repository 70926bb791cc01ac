"""Before the package is made, an editable one too: build the console that it serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConsoleHook(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        sys.path.insert(0, str(root))
        try:
            from edge.console.build import BUILT, build_console

            build_console(BUILT, root / ".cache" / "assets")
        finally:
            sys.path.remove(str(root))
