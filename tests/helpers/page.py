"""What a person does on the server's page, and sees there."""

from __future__ import annotations

from typing import Any

from helpers import PICTURES

PICTURE = PICTURES / "held_out_1.png"  # 173 x 119 pixels
OTHER = PICTURES / "held_out_6.png"


def ask(page: Any, question: str) -> None:
    """Write a question and ask it."""
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def ended(page: Any, number: int = 1) -> Any:
    """Return the answer with this number, when it has ended."""
    answer = page.locator(".answer").nth(number - 1)
    answer.locator(".tools").wait_for()
    return answer


def text_of(answer: Any) -> str:
    """Return the text of an answer as it is, line breaks and all."""
    text: str = answer.locator("> .text").evaluate("(each) => each.textContent")
    return text


def figures_of(answer: Any) -> dict[str, str]:
    """Return the figures under an answer."""
    return dict(zip(answer.locator("dt").all_text_contents(), answer.locator("dd").all_text_contents(), strict=True))
