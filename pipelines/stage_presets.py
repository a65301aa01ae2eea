"""The stages that OpenMoE's authors trained in: mixtures, objectives, and where one followed the other.

Their weights are shares of examples, ours of rows. They call the mixtures I, II and III. Where II and III read an
English Wikipedia of 2019 beside RedPajama's (6.5 of 13, 2.5 of 7), one source `wikipedia` has the weights of both.
"""

from __future__ import annotations

from typing import Any

_TOKENS_PER_STEP = 1024 * 2048

_MIXTURE_I = {
    "c4": 15,
    "wikipedia": 4.5,
    "stackexchange": 2,
    "arxiv": 2.5,
    "book": 4.5,
    "github": 4.5,
    "common_crawl": 67,
    "the_stack_dedup": 100,
}
_MIXTURE_II = {
    "c4": 15,
    "wikipedia": 13,
    "stackexchange": 2.5,
    "arxiv": 4.5,
    "book": 6.5,
    "github": 5,
    "common_crawl": 43.5,
    "the_stack_dedup": 10,
}
_MIXTURE_III = {
    "c4": 15,
    "wikipedia": 7,
    "stackexchange": 1,
    "arxiv": 4.5,
    "book": 4.5,
    "github": 5,
    "common_crawl": 33,
    "the_stack_dedup": 30,
}


def _two(first: dict[str, float], first_steps: int, then: dict[str, float], objective: str) -> list[dict[str, Any]]:
    return [
        {"until_tokens": first_steps * _TOKENS_PER_STEP, "weights": first, "objective": "ul2"},
        {"weights": then, "objective": objective},
    ]


# As `stages` of a run file. OpenMoE-8B as it was trained; with UL2 in stage 2 too, for which its authors had a
# configuration; OpenMoE-34B, whose mixture stayed.
STAGE_PRESETS = {
    "openmoe-8b": _two(_MIXTURE_I, 390_000, _MIXTURE_II, "next_token"),
    "openmoe-8b-ul2": _two(_MIXTURE_I, 390_000, _MIXTURE_II, "ul2"),
    "openmoe-34b": _two(_MIXTURE_III, 25_000, _MIXTURE_III, "next_token"),
}
