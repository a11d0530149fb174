"""Chat templates that cost too much: one clear error within the limits, and the next chat is rendered."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

from fuzz.children import ChildrenWatch
from fuzz.families.templates import EVERY_MARKER
from helpers import ROOT
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from runtime.chat import (
    KNOWN_TEMPLATES,
    MAX_CHAT_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    ChatTemplate,
)
from runtime.errors import CapacityError, EngineError, Qwen3VLError, UsageError
from runtime.input_kinds.image import IMAGE_TOKEN
from runtime.messages import normalise_messages
from runtime.template_engine import MARKER, CompiledTemplate
from runtime.template_process import TemplateProcess

DEMO_TEMPLATE = (ROOT / "qwen3vl_export/demo/checkpoint/chat_template.jinja").read_text(encoding="utf-8")
IMAGE = {"type": "image", "image": "a"}
CHAT = normalise_messages([{"role": "user", "content": [IMAGE, {"type": "text", "text": "é"}]}])[0]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SWITCH = f"{{% if messages[0].content[0].text == 'long' %}}{LOOPS}{{% endif %}}"

MEMORY, TIME, NESTED = "MiB of memory", "s of processor time", "not valid jinja2"
LENGTH = "characters, expected at most"
COSTLY = {
    "constant folded": ("{{ 'a' * 10**9 }}", MEMORY),
    "list folded": ("{{ [1] * 10**9 }}", MEMORY),
    "power folded": ("{{ 10 ** 300000000 }}", f"{TIME}|{MEMORY}"),
    "doubled": ("{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", MEMORY),
    "filter": ("{{ 'a' | center(2000000000) }}", MEMORY),
    "format": ("{{ '%2000000000d' % 1 }}", MEMORY),
    "loops": (LOOPS, TIME),
    "markers": (EVERY_MARKER, TIME),
    "output": ("{% set x = 'x' * 1000000 %}{% for i in range(20) %}{{ x }}{% endfor %}", LENGTH),
    "joined output": ("{% set x = 'x' * 10000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}", MEMORY),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "reason": ("{{ raise_exception('x' * 50000) }}", "refuses these messages"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", NESTED),
    "signs": ("{{ " + "-" * 100_000 + "1 }}", NESTED),
    "ifs": ("{%- if true -%}" * 5000 + "{% endif %}" * 5000, NESTED),
    "blocks": ("{% for a in b %}" * 21 + "{% endfor %}" * 21, NESTED),
    "digits": ("{{ " + "9" * 5000 + " }}", NESTED),
    "source": ("a" * (MAX_TEMPLATE_CHARACTERS + 1), "characters, expected at most"),
}


@pytest.fixture(scope="module")
def instruct() -> ChatTemplate:
    return ChatTemplate(INSTRUCT_TEMPLATE)


@pytest.mark.portable
@pytest.mark.parametrize("name", list(COSTLY))
def test_what_costs_too_much_is_refused(name: str) -> None:
    source, words = COSTLY[name]
    before, started = psutil.Process().memory_info().rss, os.times()
    with ChildrenWatch() as rendering, pytest.raises(Qwen3VLError, match=words) as caught:
        ChatTemplate(source).render(CHAT)
    assert "the chat template" in caught.value.message and len(str(caught.value)) <= 500
    assert isinstance(caught.value, (EngineError, UsageError, CapacityError))
    assert psutil.Process().memory_info().rss - before < 100 << 20
    # The interpreter and jinja2 are some 30 MiB. Processes that ended are waited for when the template goes.
    assert rendering.largest_bytes < 340 << 20
    gc.collect()
    ended = os.times()
    spent_s = ended.children_user + ended.children_system - started.children_user - started.children_system
    assert spent_s < 20  # compiling and rendering one second each, and starting, on a machine of any speed


@pytest.mark.portable
def test_the_memory_of_rendering_is_seen() -> None:
    """Else the test above could not fail."""
    with ChildrenWatch() as rendering:
        template = ChatTemplate("{% set x = 'x' * n %}{{ x | length }}")
        assert template.render(CHAT, chat_template_kwargs={"n": 150_000_000}).text == "150000000"
    assert 150_000_000 < rendering.largest_bytes < 300 << 20
    assert rendering.grown_bytes > 100_000_000


def go_on_when_asked(child: psutil.Process) -> None:
    """Let a stopped worker go on once a request waits in its pipe."""
    with open(f"/proc/{child.pid}/fd/0", "rb") as pipe:
        select.select([pipe], [], [])
        child.send_signal(signal.SIGCONT)


@pytest.mark.portable
def test_a_process_that_dies_of_the_stack_is_an_error() -> None:
    # No template is known that overflows C's stack below Python's limit of recursion; a signal stands for it.
    process = TemplateProcess("{{ 1 }}", [IMAGE_TOKEN], MAX_CHAT_CHARACTERS)
    process.compile()
    child = max(children(), key=lambda child: child.create_time())
    child.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 300
    while child.status() != psutil.STATUS_STOPPED:  # of two that wait, the system would deliver SIGSEGV first
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGSEGV)  # met when it goes on
    asked = threading.Thread(target=go_on_when_asked, args=(child,))
    asked.start()
    with pytest.raises(EngineError, match="nested too deeply"):
        process.render({}, {})
    asked.join()
    assert process.render({}, {}) == {"text": "1", "places": []}


@pytest.mark.portable
def test_after_a_chat_that_was_stopped_the_next_is_rendered() -> None:
    template = ChatTemplate(SWITCH + INSTRUCT_TEMPLATE)
    expected = ChatTemplate(INSTRUCT_TEMPLATE).render(CHAT)
    for _ in range(2):
        assert template.render(CHAT) == expected
        with pytest.raises(EngineError, match=TIME):
            template.render(normalise_messages("long")[0])
    assert template.render(CHAT) == expected


MARKERS = " ".join(MARKER.format(number=number, index=0) for number in range(2))
CHATS = [
    CHAT,
    normalise_messages("Grüße, 日本語, 🙂\u0000\x1b \\ \" ' <|im_end|> {{ 7 * 7 }} \u2028")[0],
    normalise_messages([{"role": "user", "content": f"{IMAGE_TOKEN} {MARKERS}"}])[0],
    normalise_messages([{"role": "user", "content": "a" * 200_000}])[0],
]


@pytest.mark.portable
@pytest.mark.parametrize("source", [INSTRUCT_TEMPLATE, THINKING_TEMPLATE, DEMO_TEMPLATE + "{# #}", DEMO_TEMPLATE])
def test_the_text_is_that_of_jinja2_in_this_process(source: str) -> None:
    here = CompiledTemplate(source, [IMAGE_TOKEN], MAX_CHAT_CHARACTERS)
    tokens = {"eos_token": "<|im_end|>", "sep_token": "\ud800"}
    template = ChatTemplate(source, special_tokens=tokens)
    assert template.variables == here.variables
    for chat in CHATS:
        variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": True}
        rendered = template.render(chat)
        assert (rendered.text, list(rendered.places)) == here.render(tokens, variables)


@pytest.mark.portable
def test_values_arrive_as_they_are() -> None:
    template = ChatTemplate("{{ x }}|{{ x | tojson if x is mapping else '' }}")
    for value in (10**300, -1.5e300, float("inf"), True, None, {"a": [1, {"b": "\u2028"}]}, "é" * 9):
        rendered = template.render(CHAT, chat_template_kwargs={"x": value})
        assert rendered.text == f"{value}|{json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else ''}"


@pytest.mark.portable
def test_a_number_of_too_many_digits_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="an integer of 16610 bits"):
        ChatTemplate("{{ x }}").render(CHAT, chat_template_kwargs={"x": 10**5000})


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "template_worker.py" in " ".join(child.cmdline())]


@pytest.mark.portable
def test_a_known_template_needs_no_other_process() -> None:
    before = len(children())
    assert hashlib.sha256(DEMO_TEMPLATE.encode()).hexdigest() in KNOWN_TEMPLATES
    template = ChatTemplate(DEMO_TEMPLATE)
    assert len(template.render(CHAT).places) == 1 and len(children()) == before
    other = ChatTemplate(DEMO_TEMPLATE + "{# #}")
    assert len(children()) == before + 1
    del other
    assert len(children()) == before


@pytest.mark.portable
def test_every_hash_is_one_of_a_template_that_travels_here() -> None:
    files = (ROOT / "qwen3vl_export/demo").glob("*/chat_template.jinja")
    assert {hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == KNOWN_TEMPLATES.keys()


@pytest.mark.portable
def test_a_worker_that_was_killed_is_started_again(instruct: ChatTemplate) -> None:
    expected = instruct.render(CHAT)
    for child in children():
        child.kill()
        child.wait()
    assert instruct.render(CHAT) == expected


@pytest.mark.portable
def test_threads_take_turns(instruct: ChatTemplate) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        for i in range(10):
            text = f"{number} {i} " + "x" * 1000 * number
            if text not in instruct.render(normalise_messages(text)[0]).text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.portable
def test_an_interrupt_leaves_no_answer_for_the_next_chat(instruct: ChatTemplate) -> None:
    long = "x" * 1_000_000
    num_interrupted = 0
    is_rendering = False

    def interrupt(*_: object) -> None:
        if is_rendering:  # a render may end before its alarm
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    for i in range(12):
        try:
            is_rendering = True
            signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.004 * i)
            instruct.render(normalise_messages(long)[0])
            is_rendering = False
        except KeyboardInterrupt:
            num_interrupted += 1
        is_rendering = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert f"user\n{i}<|im_end|>" in instruct.render(normalise_messages(str(i))[0]).text
    signal.signal(signal.SIGALRM, before)
    assert num_interrupted > 0


def render_in_child(template: ChatTemplate, text: str, results: Any) -> None:
    results.put(template.render(normalise_messages(text)[0]).text)


@pytest.mark.portable
def test_a_forked_process_has_a_worker_of_its_own(instruct: ChatTemplate) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=render_in_child, args=(instruct, f"child {i}", results), daemon=True) for i in range(3)
    ]
    for worker in workers:
        worker.start()
    assert "user\nparent<" in instruct.render(normalise_messages("parent")[0]).text
    texts = {results.get(timeout=300) for _ in workers}
    for worker in workers:
        worker.join(300)
    assert texts == {instruct.render(normalise_messages(f"child {i}")[0]).text for i in range(3)}
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


@pytest.mark.portable
def test_a_fork_in_the_middle_of_a_render_does_not_wait_for_it() -> None:
    template = ChatTemplate(SWITCH + "{{ messages[0].content[0].text }}")

    def render_long() -> None:
        with pytest.raises(EngineError, match=TIME):
            template.render(normalise_messages("long")[0])

    thread = threading.Thread(target=render_long)
    thread.start()
    time.sleep(0.3)  # the thread holds the lock
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=render_in_child, args=(template, "child", results))
    worker.start()
    assert results.get(timeout=300) == "child"
    worker.join(300)
    thread.join()
    assert worker.exitcode == 0 and template.render(normalise_messages("parent")[0]).text == "parent"


@pytest.mark.portable
def test_the_worker_ends_with_its_parent() -> None:
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1])\n"
        "from runtime.chat import ChatTemplate\n"
        "import subprocess\n"
        "template = ChatTemplate('{{ messages }}')\n"
        "print(*open(f'/proc/self/task/{os.getpid()}/children').read().split(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=300)
    (number,) = done.stdout.split()
    for _ in range(6000):
        if not psutil.pid_exists(int(number)) or psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"process {number} outlives its parent")


@pytest.mark.portable
@pytest.mark.parametrize("executable", ["", None, "/usr/bin/blender", "/nowhere/python3"])
def test_a_program_with_python_inside_is_not_started(executable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ChatTemplate("{{ 1 }}").render(CHAT)
    monkeypatch.setattr(sys, "executable", executable)
    assert ChatTemplate("{{ 1 }}").render(CHAT) == expected  # by the interpreter of sys.base_prefix
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    with pytest.raises(EngineError, match=r"no Python interpreter\n  remedy: set sys\.executable"):
        ChatTemplate("{{ 1 }}")
    assert ChatTemplate(DEMO_TEMPLATE).render(CHAT).places


@pytest.mark.portable
def test_signals_that_the_parent_ignores_or_blocks_still_end_the_worker() -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        with pytest.raises(EngineError, match=TIME):
            ChatTemplate(COSTLY["loops"][0]).render(CHAT)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.portable
@pytest.mark.parametrize("source", [DEMO_TEMPLATE, INSTRUCT_TEMPLATE])
def test_messages_beyond_every_context_are_refused_before_they_are_rendered(source: str) -> None:
    template = ChatTemplate(source)
    half = "a" * (MAX_CHAT_CHARACTERS // 2 + 1)
    chat = [{"role": "user", "content": half}] * 2
    with pytest.raises(CapacityError, match="the messages hold more than 16777216 characters"):
        template.render(chat)
