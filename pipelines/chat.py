"""Conversations in the form in which the original's chat models were tuned, for training and for prompts alike.

An answer is one example: all that was said before it is the prompt, on which there is no loss. `</s>` is plain text, as
it was there; each example ends with EOS besides (OpenMoE's script/inference_on_multi_devices.py, FastChat's template).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SYSTEM = "You are a helpful, respectful and honest assistant."
END = " </s>"


class Example(NamedTuple):
    """What the model reads, and what it learns to answer."""

    prompt: str
    answer: str


def prompt(question: str, before: Sequence[tuple[str, str]] = (), system: str = SYSTEM) -> str:
    """Returns what the model reads: the system's words, earlier questions with their answers, the question."""
    turns = "".join(f"<s>[INST] {asked} [/INST] {answered}{END}" for asked, answered in before)
    return f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns}<s>[INST] {question} [/INST]"


def examples(record: Any) -> list[Example] | str:
    """Returns an example for each answer of {"messages": [{"role": ..., "content": ...}]}, or why it has none.

    Roles are user and assistant in turns, after at most one system message; a last question without an answer teaches
    nothing.
    """
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "no_messages"
    roles, texts = ([message.get(key) for message in messages] for key in ("role", "content"))
    if not all(isinstance(text, str) for text in texts):
        return "not_string"
    system = SYSTEM
    if roles[:1] == ["system"]:
        system, roles, texts = texts[0], roles[1:], texts[1:]
    if len(roles) < 2 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        return "bad_roles"
    if not all(text.strip() for text in texts):
        return "empty"
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    return [
        Example(prompt(question, turns[:i], system), f"{answer}{END}") for i, (question, answer) in enumerate(turns)
    ]
