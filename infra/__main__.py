"""`python -m infra` is the `weft` command: how `weft up` starts its children, wherever it is installed."""

from infra.cli import main

main()
