"""`python -m optikit` is `optikit`."""

from optikit.cli.app import main

main()
