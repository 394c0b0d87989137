#!/usr/bin/env python3
"""Renders chat templates with the transformers library: tests/fixtures/serve/chats.json, for src/serve/chat.rs.

The templates are written here; between them they use what the published ones of the families that memory3 runs use.

    python3 tools/make_chat_fixtures.py
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

OUT = Path(__file__).resolve().parent.parent / "tests/fixtures/serve/chats.json"

TEMPLATES = {
    # Turns between markers, a default system message, the prompt of the answer.
    "markers": """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{%- endif %}""",
    # The system message folded into the first turn; turns must alternate.
    "brackets": """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = none -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {%- if loop.first and system is not none -%}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] -%}
    {%- else -%}
        {%- set content = message['content'] -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}""",
    # Namespaces, macros, tests of what is defined, Python's methods, loop control, JSON.
    "long": """{{- bos_token }}
{%- set state = namespace(turns=0, last='') %}
{%- macro head(role) -%}
<|head|>{{ role.upper() }}<|end|>
{% endmacro %}
{%- if tools is defined and tools is not none and tools | length > 0 %}tools: {{ tools | tojson }}{% endif %}
{%- if date is not defined %}{% set date = 'no date' %}{% endif %}
{{ head('system') }}[{{ date }}] {{ messages | length }} messages, {{ messages | map(attribute='role') | join(',') }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- set state.last = message.content.split(' ')[-1].rstrip('.?!') %}
{{ head(message.role) -}}
    {% if message.content.startswith('/') and 'x' not in message.content %}command {{ message.content[1:] | tojson }}
    {%- elif message.name is defined %}{{ message.name }}: {{ message.content.replace('a', 'A') }}
    {%- else %}{{ message.content | replace('<', '&lt;') }}{{ {'end': [loop.last, 1.5, none], 'turn': state.turns} | tojson }}
    {%- endif %}
    {% generation %}answer{%- endgeneration -%}
    {%- if state.turns >= 4 %}{% break %}{% endif %}
{%- endfor %}
{{ '%s of %s' | format(state.turns, messages[-1]['role']) }} {{ state.last }} {{ messages[::-1][0].content | length }}
{% for i in range(3) -%}
{{ i }}{{ ', ' if not loop.last else '.' }}
{%- endfor %}
{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}""",
}

SYSTEM = {"role": "system", "content": "Answer in one line.\n"}
HELLO = {"role": "user", "content": "  How high is Mount Corran? \n"}
ANSWER = {"role": "assistant", "content": "1 204 metres."}
MORE = {"role": "user", "name": "Ada", "content": "Und auf Deutsch? \u00fcber <b>\u706f\u5854</b>"}
COMMAND = {"role": "user", "content": "/list \"all\" & <b>"}

CHATS = {
    "one turn": [HELLO],
    "system and three turns": [SYSTEM, HELLO, ANSWER, MORE],
    "a command": [SYSTEM, COMMAND],
    "out of turn": [HELLO, MORE],
    "many turns": [HELLO, ANSWER, COMMAND, ANSWER, HELLO, ANSWER],
}


def main():
    cases = []
    for template, source in TEMPLATES.items():
        for chat, messages in CHATS.items():
            try:
                rendered, _ = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
                )
                outcome = {"text": rendered[0]}
            except Exception as error:  # what the template itself raises
                outcome = {"error": str(error)}
            cases.append({"template": template, "chat": chat, "messages": messages, **outcome})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"templates": TEMPLATES, "cases": cases}, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(cases)} cases in {OUT}")


if __name__ == "__main__":
    main()
