"""Which Python, Ray and JAX a cluster gets: those of the machine that renders its files, as Ray wants them equal."""

import sys
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions as text: python "3.11", ray "2.60.0", jax "0.10.2"."""

    python: str
    ray: str
    jax: str


def installed() -> Versions:
    """Returns the versions of this environment."""
    python = ".".join(map(str, sys.version_info[:2]))
    return Versions(python=python, ray=metadata.version("ray"), jax=metadata.version("jax"))
