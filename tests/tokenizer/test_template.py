"""ChatTemplate against jinja2 and transformers, and against templates that mean harm."""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from jinja2.ext import loopcontrols

from pyengine.errors import ArgumentError, CapacityError, ModelFileError
from pyengine.testing.chat_templates import CHATML, CONVERSATIONS, LLAMA2, QWEN3, TEMPLATES, TOOLS, ZEPHYR
from pyengine.testing.tiny import write_tiny_tokenizer
from pyengine.tokenizer import ChatTemplate, TemplateError, Tokenizer, assistant_mask
from pyengine.tokenizer.template_process import TemplateLimits

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime.datetime(2026, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, ChatTemplate]]:
    templates = {name: ChatTemplate(source, special_tokens=SPECIAL) for name, source in TEMPLATES.items()}
    yield templates
    for template in templates.values():
        template.close()


def render_with_jinja2(source: str, **variables: Any) -> tuple[str, str]:
    """("text", output) or ("error", message), in the environment that transformers uses."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    for tag, plain in (("{%- generation -%}", "{%- if true -%}"), ("{%- endgeneration -%}", "{%- endif -%}")):
        source = source.replace(tag, plain)
    try:
        return "text", environment.from_string(source).render(**SPECIAL, documents=None, **variables)
    except jinja2.exceptions.TemplateError as error:
        return "error", str(error)


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_renders_as_jinja2_does(compiled: dict[str, ChatTemplate], name: str, conversation: str) -> None:
    for add_generation_prompt in (False, True):
        for tools in (None, TOOLS):
            variables: dict[str, Any] = {
                "messages": CONVERSATIONS[conversation],
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
            kind, expected = render_with_jinja2(TEMPLATES[name], **variables)
            if kind == "text":
                assert compiled[name].render(**variables, now=NOW) == expected
            else:
                with pytest.raises(TemplateError) as caught:
                    compiled[name].render(**variables, now=NOW)
                assert (caught.value.reason, caught.value.message) == ("raised", expected)


def test_most_renderings_are_texts() -> None:
    """The comparison above would say little if the oracle refused everything."""
    kinds = [
        render_with_jinja2(source, messages=messages, tools=None, add_generation_prompt=True)[0]
        for source in TEMPLATES.values()
        for messages in CONVERSATIONS.values()
    ]
    assert len(kinds) == 120
    assert kinds.count("text") >= 110


def test_smollm2_renders_and_encodes_as_transformers(
    smollm2_metadata: dict[str, Any], smollm2_transformers: Any
) -> None:
    oracle = smollm2_transformers
    template = ChatTemplate.from_gguf(smollm2_metadata)
    tokenizer = Tokenizer.from_gguf(smollm2_metadata)
    source = smollm2_metadata["tokenizer.chat_template"]
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            arguments = {"chat_template": source, "add_generation_prompt": prompt}
            text = template.render(messages, add_generation_prompt=prompt)
            assert text == oracle.apply_chat_template(messages, tokenize=False, **arguments)
            ids = oracle.apply_chat_template(messages, **arguments)["input_ids"]
            assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_special_tokens_and_variables() -> None:
    template = ChatTemplate("{{ bos_token }}{{ flag }}{{ missing }}", special_tokens=SPECIAL)
    assert template.render([], flag=1) == "<s>1"
    assert template.render([], bos_token="x") == "x"
    with pytest.raises(TypeError):
        template.render([], messages=[])  # type: ignore[misc]


BOMBS = {
    "repeat": ("{{ 'a' * 10**9 }}", {"render"}),
    "repeat_folded": ("{% set x = 'a' * 1000000000 %}", {"render"}),
    "repeat_list": ("{{ [0] * 10**9 }}", {"render"}),
    "power": ("{{ 2 ** 1000000000 }}", {"render"}),
    "range": ("{{ range(10**12) | list | length }}", {"render"}),
    "nested_ranges": (
        "{% for i in range(999) %}" * 3 + "x" + "{% endfor %}" * 3,
        {"fuel"},
    ),
    "doubling": (
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        {"memory"},
    ),
    "list_doubling": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
        {"memory", "render", "fuel", "time"},
    ),
    "format": ("{{ '{:>999999999}'.format(1) }}", {"memory", "render", "output"}),
    "percent_format": ("{{ '%999999999d' | format(1) }}", {"memory", "render", "output"}),
    "percent_format_small": ("{{ '%9999999d' | format(1) }}", {"output"}),
    "replace": ("{{ ('a' * 100000) | replace('a', 'b' * 100000) | length }}", {"memory", "render"}),
    "slow_filter": (
        "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{{ s | replace('a', 'b') | length }}{% endfor %}",
        {"time"},
    ),
    "recursive_macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", {"render"}),
    "recursive_loop": ("{% for m in [1] recursive %}{{ loop([1]) }}{% endfor %}", {"render"}),
    "self_reference": ("{% set n = namespace() %}{% set n.x = n %}{{ n }}", {"crash"}),
    "deep_brackets": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", {"syntax"}),
    "deep_lists": ("{{ " + "[" * 20000 + "]" * 20000 + " }}", {"syntax"}),
    "deep_blocks": ("{% if x %}" * 20000 + "{% endif %}" * 20000, {"syntax", "crash"}),
    "long_sum": ("{{ 1" + "+1" * 60000 + " }}", {"crash"}),
    "long_not": ("{{ " + "not " * 60000 + "1 }}", {"syntax", "crash"}),
    "long_output": ("{% for i in range(500) %}{{ 'a' * 10000 }}{% endfor %}", {"output"}),
    "long_source": ("a" * (2 << 20), {"syntax"}),
    "include_itself": ("{% include 'chat' %}", {"render"}),
    "extends_itself": ("{% extends 'chat' %}", {"render"}),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bomb_ends_in_a_typed_error(name: str) -> None:
    source, reasons = BOMBS[name]
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert caught.value.reason in reasons


ATTACKS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].__class__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages[0].get.__globals__ }}",
    "{{ messages.append.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ strftime_now.__self__ }}",
    "{{ strftime_now.__self__.environment }}",
    "{{ strftime_now | attr('__globals__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ loop.__class__ }}",
    "{{ debug() }}",
    "{{ open('/etc/passwd') }}",
    "{{ __import__('os') }}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{{ messages[0].content.format_map.__self__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ (messages | map('__class__') | list) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_attack_reaches_no_python_object(source: str) -> None:
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "x"}])
    except TemplateError:
        return
    assert not any(word in text for word in ("class", "builtin", "module", "0x", "root:", "uid=", "environment"))


def test_a_crash_leaves_the_template_usable() -> None:
    template = ChatTemplate("{% if bomb %}{% set n = namespace() %}{% set n.x = n %}{{ n }}{% endif %}ok")
    for _ in range(2):
        assert template.render([]) == "ok"
        with pytest.raises(TemplateError, match=r"crash"):
            template.render([], bomb=True)


def test_limits_are_settable() -> None:
    limits = replace(TemplateLimits(), fuel=100, output_bytes=8, source_bytes=64, input_bytes=256)
    assert ChatTemplate("é" * 4, limits=limits).render([]) == "é" * 4
    with pytest.raises(TemplateError, match=r"output: expected at most 8 bytes"):
        ChatTemplate("é" * 5, limits=limits).render([])
    with pytest.raises(TemplateError, match=r"fuel"):
        ChatTemplate("{% for i in range(99) %}{{ i }}{% endfor %}", limits=limits).render([])
    with pytest.raises(TemplateError, match=r"syntax: expected at most 64"):
        ChatTemplate("a" * 65, limits=limits)
    with pytest.raises(CapacityError, match=r"messages: expected at most 256 bytes"):
        ChatTemplate("a", limits=limits).render([{"role": "user", "content": "x" * 300}])


@pytest.mark.parametrize("content", ["\ud800", float("nan"), b"bytes", object()])
def test_values_that_are_not_json(content: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^messages: expected plain JSON"):
        ChatTemplate("x").render([{"role": "user", "content": content}])


def test_deep_and_circular_values() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for content in (deep, circle):
        with pytest.raises(ArgumentError, match=r"^messages"):
            ChatTemplate("x").render([{"role": "user", "content": content}])
    deep.clear()


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("a\nb\n{% for %}")
    assert (caught.value.reason, caught.value.line) == ("syntax", 3)


def test_threads_and_forks_share_a_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            results[number] = template.render([{"role": "user", "content": str(number) * 1000}])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: str(number) * 1000 for number in range(8)}

    renderer = template._process._child
    assert renderer is not None
    child = os.fork()
    if child == 0:
        code = 1
        try:
            text = template.render([{"role": "user", "content": "child"}])
            # A renderer shared by two processes would mix their answers.
            own = template._process._child
            code = 0 if text == "child" and own is not None and own.pid != renderer.pid else 1
        finally:
            os._exit(code)
    assert template.render([{"role": "user", "content": "parent"}]) == "parent"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert template._process._child is renderer
    assert template.render([{"role": "user", "content": "parent"}]) == "parent"


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("x")
    child = template._process._child
    assert child is not None
    assert child.poll() is None
    del template
    assert child.poll() is not None


def test_from_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"chat_template"):
        ChatTemplate.from_folder(tmp_path)
    named = [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T"}]
    config: dict[str, Any] = {"chat_template": named, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_folder(tmp_path).render([]) == "D</s>"
    assert ChatTemplate.from_folder(tmp_path, name="tool_use").render([]) == "T"
    with pytest.raises(ModelFileError, match=r"'rag'"):
        ChatTemplate.from_folder(tmp_path, name="rag")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "S{{ eos_token }}"}))
    assert ChatTemplate.from_folder(tmp_path).render([]) == "S</s>"
    ChatTemplate("F{{ eos_token }}").save(tmp_path)
    assert ChatTemplate.from_folder(tmp_path).render([]) == "F</s>"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"UTF-8"):
        ChatTemplate.from_folder(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
def test_mask_covers_what_the_assistant_wrote(tokenizer: Tokenizer, conversation: str) -> None:
    messages = [message for message in CONVERSATIONS[conversation] if message["role"] != "tool"]
    template = ChatTemplate(CHATML)
    ids, mask = assistant_mask(tokenizer, template, messages)
    assert ids == tokenizer.encode(template.render(messages))
    assert len(mask) == len(ids)
    written = "".join(message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant")
    masked = [token_id for token_id, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(masked, skip_special_tokens=False) == written


def test_mask_agrees_with_generation_tags(tmp_path: Path) -> None:
    """transformers marks the tokens of a template's {% generation %} blocks."""
    transformers = pytest.importorskip("transformers")
    write_tiny_tokenizer(tmp_path)
    tagged = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, template = Tokenizer.from_folder(tmp_path), ChatTemplate(tagged)
    for name in ("answered", "system_answered", "four_turns", "long", "white_space", "empty"):
        messages = CONVERSATIONS[name]
        expected = oracle.apply_chat_template(
            messages, chat_template=tagged, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = assistant_mask(tokenizer, template, messages)
        assert ids == expected["input_ids"]
        assert mask == expected["assistant_masks"]


def test_mask_of_other_styles(tokenizer: Tokenizer) -> None:
    messages = CONVERSATIONS["four_turns"]
    ids, mask = assistant_mask(tokenizer, ChatTemplate(LLAMA2, special_tokens=SPECIAL), messages)
    masked = [token_id for token_id, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(masked) == " 2 </s> 4 </s>"
    ids, mask = assistant_mask(tokenizer, ChatTemplate(ZEPHYR, special_tokens={"eos_token": "<|im_end|>"}), messages)
    masked = [token_id for token_id, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(masked, skip_special_tokens=False).count("<|im_end|>") == 2


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError) as caught:
        assistant_mask(tokenizer, ChatTemplate(QWEN3), CONVERSATIONS["thoughts"])
    assert caught.value.reason == "prefix"
