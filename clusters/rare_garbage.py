"""Lets this process look for garbage seldom; every process of a Ray on this machine imports it before Ray's libraries.

Python otherwise looks through all that has been imported so far again and again: a third of the time that Ray Train and
JAX take to import.
"""

from __future__ import annotations

import gc

OBJECTS = 100_000  # more of them than before, and Python looks which are garbage

gc.set_threshold(OBJECTS)
