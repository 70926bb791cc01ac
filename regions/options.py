"""Options that several commands take, spelt and explained once."""

from __future__ import annotations

from pathlib import Path

import click

from infra.development import DATA_FOLDER

data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=DATA_FOLDER,
    show_default=True,
    help="Folder of the cluster.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Instead of --data: settings of a region or edge, wherever it runs.",
)
