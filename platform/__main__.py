"""`python -m openmoe.platform` is `openmoe`."""

from openmoe.platform.commands.cli import main

main()
