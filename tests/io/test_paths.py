"""Paths in published files."""

from __future__ import annotations

import pytest

from sd_unlearn.io.paths import public_text


@pytest.mark.parametrize(
    ("place", "text", "public"),
    [
        ("/home/jane/loras/", "--lora /home/jane/loras has no LoRA.", "--lora loras has no LoRA."),
        ("/home/jane doe/a.pt", "/home/jane doe/a.pt is damaged.", "a.pt is damaged."),
        ("runs/a", "runs/a is damaged, /home/jane/runs/b is not.", "runs/a is damaged, b is not."),
        ("owner/name", "/home/jane/.cache/hub/models--owner--name/a.safetensors: damaged", "a.safetensors: damaged"),
        ("owner/name", 'owner/name: "/home/jane/a.pt", ~/b/c.pt, x=/d/e', 'owner/name: "a.pt", c.pt, x=e'),
        ("owner/name", "See https://huggingface.co/owner/name and docs/bases.md, up and/or down.", None),
    ],
)
def test_messages_name_no_folders_of_the_machine(place: str, text: str, public: str | None) -> None:
    assert public_text(text, place) == (text if public is None else public)
