"""Chat templates in the styles that are in wide use, and conversations to render with them."""

from __future__ import annotations

from typing import Any

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{{- message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

CHATML_DEFAULT_SYSTEM = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ (message.content | trim) ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message %}
        {%- set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}
{%- if tools is not none %}
    {{- 'Functions:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}{{ '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}{{- '}' }}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is not string %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages if message.role != 'tool' %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}
                    {%- else %}{{ '"' + key + '": ' + val|tojson }}{% endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}{% if not loop.last %}{{ ", " }}{% else %}{{ "]" }}{% endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message.content %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ALPACA = """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% else %}
{{ 'Below is an instruction that describes a task. Write a response that completes it.\n\n' }}
{%- endif %}

{%- for message in messages %}
    {% if message['role'] == 'user' %}
### Instruction:
{{ message['content'] | trim }}

    {% elif message['role'] == 'assistant' %}
### Response:
{{ message['content'] | trim -}}
{% if not loop.last %}


{% endif %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}
### Response:
{% endif %}"""

GEMMA = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content ~ '\n\n' %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + (ns.system if loop.first or loop.previtem.role == 'system' else '') }}
    {{- message.content | trim }}{{ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Drops the thoughts of earlier turns, so that a later turn changes the text before it.
QWEN3 = """{%- set ns = namespace(last_query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.found = true %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- generation -%}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
        {%- endgeneration -%}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content|string + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

MACROS = """{%- macro turn(role, content='') -%}
[{{ role|upper }}] {{ content }}{% if caller is defined %}?{% endif %}
{%- endmacro -%}
{%- for message in messages -%}
{{ turn(message.role, message.content|replace('\n', ' ')|string) }}{{ ' | ' if not loop.last }}
{%- endfor -%}
{% for key, value in messages[0]|dictsort %} {{ loop.index }}/{{ loop.length }}:{{ key }}={{ value }}{% endfor %}
{% set roles = messages|map(attribute='role')|list %}{{ roles }} {{ roles|unique|join(',') }}
{{ messages|length > 2 }} {{ none }}
{{ {'a': 1, 'b': [true, none, 1.5]}|tojson }} {{ '<&>"' ~ "'" }} {{ messages[0].get('name', 'anon') }}
{{ 7 // 2 }} {{ 7 / 2 }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "chatml_default_system": CHATML_DEFAULT_SYSTEM,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "alpaca": ALPACA,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "macros": MACROS,
}


def _turn(role: str, content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


_CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich", "days": 3, "units": None, "exact": 1.5}}}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one_turn": [_turn("user", "Hello!")],
    "answered": [_turn("user", "Hello!"), _turn("assistant", "Hi.")],
    "system": [_turn("system", "You are terse."), _turn("user", "Why?")],
    "system_answered": [_turn("system", "A\nB"), _turn("user", "Why?"), _turn("assistant", "Because.\n\nReally.")],
    "four_turns": [_turn("user", "1"), _turn("assistant", "2"), _turn("user", "3"), _turn("assistant", "4")],
    "unicode": [_turn("user", "naïve 日本語 😀 \u200d e\u0301"), _turn("assistant", "«ok» \u00a0")],
    "markup": [_turn("user", "<b>&amp;</b> \"q\" 'q' {{ x }} {% y %} {# z #}"), _turn("assistant", "<|im_end|>")],
    "white_space": [_turn("user", "  lead\n\n trail \n"), _turn("assistant", "\n\tx  ")],
    "empty": [_turn("system", ""), _turn("user", ""), _turn("assistant", "")],
    "long": [_turn("user" if i % 2 == 0 else "assistant", f"message {i} " * 20) for i in range(41)],
    "tools": [
        _turn("user", "Weather?"),
        _turn("assistant", "", tool_calls=[_CALL]),
        _turn("tool", "sunny"),
        _turn("assistant", "It is <sunny>."),
    ],
    "thoughts": [
        _turn("user", "a", name="Ada"),
        _turn("assistant", "<think>\nhm\n</think>\n\nb"),
        _turn("user", "c"),
    ],
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city & its <region>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
