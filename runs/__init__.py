"""Run files shipped with the package."""
