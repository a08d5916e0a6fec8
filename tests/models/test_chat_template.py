"""Programs of a model's author: they fail, or never end, and are refused by name."""

from __future__ import annotations

import time

import pytest

import tiny
from dropbydrop.models.chat_template import in_chat_template
from dropbydrop.system.deadline import time_limit
from dropbydrop.system.errors import DropError

CHAT = [{"role": "user", "content": "the river"}]
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}"
    "{% endfor %}"
)


def test_what_the_template_writes() -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True, chat=True)
    assert in_chat_template(tokenizer, CHAT) == "<user>the river</s><assistant>"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no roles') }}", "{{ 1 + 'a' }}", "{{ messages[3].content.x }}", "{% if"],
)
def test_one_that_fails(template: str) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DropError, match="the model's chat template fails"):
        in_chat_template(tokenizer, CHAT)


def test_one_that_loops_is_stopped() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = ENDLESS
    start = time.monotonic()
    with pytest.raises(DropError, match=r"stopped after 0\.2 seconds"):
        in_chat_template(tokenizer, CHAT, seconds=0.2)
    assert time.monotonic() - start < 30  # it would take days


def test_none_at_all() -> None:
    with pytest.raises(DropError, match="fails"):
        in_chat_template(tiny.tiny_tokenizer(), CHAT)


def test_code_that_catches_everything_is_stopped() -> None:
    def stubborn() -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    with pytest.raises(TimeoutError, match=r"0\.05 seconds"), time_limit(0.05):
        stubborn()


def test_what_ends_in_time_is_left_alone() -> None:
    for i in range(300):  # some end just when the timer fires
        try:
            with time_limit(0.001):
                end = time.perf_counter() + i % 3 * 0.0005
                while time.perf_counter() < end:
                    pass
        except TimeoutError:
            continue
    time.sleep(0.01)  # nothing comes afterwards


def test_errors_of_the_block_come_through() -> None:
    with pytest.raises(ZeroDivisionError), time_limit(5):
        _ = 1 / 0
