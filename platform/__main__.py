"""`python -m openmoe.platform` is `openmoe`."""

from openmoe.platform.cli import main

main()
