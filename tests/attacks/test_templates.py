"""Limits on errors, time, memory and output of chat templates of models."""

import copy
import multiprocessing
import threading
import time
from contextlib import contextmanager

import pytest
from transformers.utils import chat_template_utils

from mmkd.data import bounded as data_bounded
from mmkd.data.bounded import BoundedEnvironment, TemplateBoundError, bounded
from mmkd.data.templates import PROBE, check_template, render
from mmkd.errors import CheckpointError, DataError
from tests.support.processors import FAMILIES

BODY = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
RAISES = {
    "division": "{{ 1 // 0 }}",
    "power": "{{ 0 ** -1 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "its own exception": "{{ raise_exception('no') }}",
    "lines in its exception": "{{ raise_exception('no\n -- forged: a -- b') }}",
    "not a number": "{{ 'a' | int(base=99) }}{{ messages[99].role.a.b }}",
    "overflow": "{{ 1e308 | int * 1e308 ** 2 }}",
    "unknown test": "{{ 1 is undefined_test }}",
    "syntax": "{% for %}",
    "deep syntax": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    "more than json": "{{ messages | tojson(indent=namespace()) }}",
}
TAKES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "doubling": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}{{ n.s }}",
    "a set block": "{% set n = namespace(s='x') %}{% for a in range(60) %}"
    "{% set b %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = b %}{% endfor %}",
    "product": "{{ 'x' * 10000000000 }}",
    "product of a list": "{{ 10000000000 * [0] }}",
    "sum": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "factorial": "{% set n = namespace(i=2) %}{% for a in range(60) %}{% set n.i = n.i * n.i %}"
    "{% endfor %}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "precision": "{{ '%.999999999f' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format of format": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "center by map": "{{ ['x'] | map('center', 9999999999) | list }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ '1'.zfill(9999999999) }}",
    "indent": "{{ 'x\ny' | indent(9999999999) }}",
    "tojson": "{{ [1] | tojson(indent=9999999999) }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list }}",
    "replace": "{% set x = 'x' * 99999 %}{{ x.replace('x', x * 99) }}",
    "replace filter": "{% set x = 'x' * 99999 %}{{ x | replace('x', x * 99) }}",
    "join": "{% set x = 'x' * 999999 %}{{ (x).join(range(9999) | map('string') | list) }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "many values": "{% set n = namespace(l=[1]) %}{% for a in range(60) %}"
    "{% set n.l = n.l + n.l %}{% endfor %}",
}


@pytest.fixture
def with_template(monkeypatch):
    monkeypatch.setattr("mmkd.data.bounded.SECONDS", 0.5)
    monkeypatch.setattr("mmkd.data.bounded.GROWTH", 2**28)
    base = FAMILIES["llava"]()

    def make(template):
        processor = copy.copy(base)
        processor.chat_template = template
        return processor

    return make


@pytest.mark.parametrize("name", RAISES)
def test_a_template_may_raise_anything(with_template, name):
    """Always, and for one record only."""
    with pytest.raises(CheckpointError) as refused:
        check_template(with_template(RAISES[name] + BODY))
    assert "\n" not in str(refused.value)
    guard = "{% if 'now' in messages | string %}", "{% endif %}"
    if "syntax" in name or name == "unknown test":
        return
    processor = with_template(RAISES[name].join(guard) + BODY)
    check_template(processor)
    said = [{"role": "user", "content": [{"type": "text", "text": "now"}]}]
    with pytest.raises(DataError, match="the chat template refuses it") as refused:
        render(processor, said)
    assert "\n" not in str(refused.value)
    assert str(refused.value).count(" -- ") == 1


@pytest.mark.parametrize("name", TAKES)
def test_a_template_takes_neither_time_nor_memory_without_end(with_template, name):
    started = time.process_time()
    with pytest.raises(CheckpointError) as refused:
        check_template(with_template(TAKES[name] + BODY))
    assert "the chat template was stopped" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert time.process_time() - started < 10
    assert "apples" in render(with_template(BODY), PROBE), "the next one runs"


def test_templates_run_in_threads_too(with_template):
    found = []

    def run(name):
        try:
            check_template(with_template(TAKES.get(name, "") + BODY))
            found.append("well")
        except CheckpointError:
            found.append("stopped")

    threads = [threading.Thread(target=run, args=(name,)) for name in ("", "loops", "")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["stopped", "well", "well"]


def test_a_thread_that_ends_leaves_the_bounds_of_others(with_template):
    inside, ended, found = threading.Event(), threading.Event(), []

    def first():
        with bounded():
            inside.wait()
        ended.set()

    def second():
        with bounded():
            inside.set()
            ended.wait()
            compiled = chat_template_utils._compile_jinja_template("{# new #}" + TAKES["product"])
            found.append(isinstance(compiled.environment, BoundedEnvironment))

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True]
    plain = chat_template_utils._compile_jinja_template("{# outside #}")
    assert not isinstance(plain.environment, BoundedEnvironment)


def test_a_forked_process_runs_templates_while_its_parent_compiles_one():
    found = multiprocessing.get_context("fork").Queue()

    def render_there():
        with bounded():
            template = chat_template_utils._compile_jinja_template("{# in the fork #}well")
            found.put(template.render())

    with bounded(), compiling():
        process = multiprocessing.get_context("fork").Process(target=render_there)
        process.start()
        try:
            assert found.get(timeout=60) == "well"
        finally:
            process.kill()


@contextmanager
def compiling():
    """Hold the lock as a thread that compiles a template does."""
    held = data_bounded._compiling
    with held:
        yield


def test_the_first_templates_of_two_threads_are_both_watched(monkeypatch):
    watch = data_bounded._Watch()
    both, inside = threading.Barrier(2), []

    def enter():
        both.wait()
        with watch.over():
            both.wait()
            inside.append(len(watch._running))
            both.wait()

    for _ in range(20):
        watch._thread = None
        threads = [threading.Thread(target=enter) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(inside) == {2}


def test_ordinary_operations_are_as_in_the_plain_sandbox():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = (
        "{{ 'a' * 3 + 'b' }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%05d' % 7 }}{{ '%s %s' % (1, 'x') }}"
        "{{ 'x' | center(9) }}{{ [1, 2] | join(', ') }}{{ 'a b' | replace(' ', '_') }}"
        "{{ '{:>5}|{}'.format(1, 1700000000) }}{{ '%s' | format(1700000000) }}"
        "{{ [3, 1] | sort | map('string') | list }}{{ 'a,b'.split(',') }}{{ 'a\nb' | indent(2) }}"
        "{{ {'a': 1} | dictsort }}{{ 1700000000 * 1000 }}{{ [1] + [2] }}{{ 1.5 * 2 }}"
    )
    plain, ours = (
        kind().from_string(text).render()
        for kind in (ImmutableSandboxedEnvironment, BoundedEnvironment)
    )
    assert plain == ours
    with pytest.raises(TemplateBoundError), bounded():
        raise TemplateBoundError
