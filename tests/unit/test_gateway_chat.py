"""Chat templates render as in transformers, and cannot do harm."""

import pytest

from services.gateway.chat import ChatTemplate, special_tokens
from services.gateway.errors import BadRequest
from shared.errors import ModelError

MESSAGES = [
    {"role": "system", "content": "Be <kind> & \"short\"."},
    {"role": "user", "content": "Grüße 漢字"},
    {"role": "assistant", "content": " hi "},
    {"role": "user", "content": "bye"},
]  # fmt: skip
TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "mixtral": """{{ bos_token }}{% for m in messages if m['role'] != 'system' %}
    {% if m['role'] == 'user' %}
[INST] {{ m['content'] | trim }} [/INST]
    {% else %}
{{ m['content'] }}{{ eos_token }}
    {% endif %}
{% endfor %}""",
    "features": """{% set ns = namespace(n=0) %}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ m | tojson }} {{ dict(a=1) | tojson(indent=1) }}
{% if ns.n == 2 %}{% break %}{% endif %}{% generation %}g{{ ns.n }}{% endgeneration %}
{% endfor %}{{ tools is none }}{{ documents is none }}{{ strftime_now('%%') }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name):
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = reference.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **special
    )
    assert ChatTemplate(TEMPLATES[name], special).render(MESSAGES) == expected[0]


CONTINUED = [*MESSAGES[:2], {"role": "assistant", "content": "The answer is "}]


@pytest.mark.parametrize("name", ["chatml", "mixtral", "trimming"])
@pytest.mark.parametrize("turn", ["none", "continue"])
def test_other_turns_render_as_transformers_does(name, turn):
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    templates = TEMPLATES | {"trimming": "{% for m in messages %}<{{ m['content'].strip() }}>{% endfor %}"}
    expected, _ = reference.render_jinja_template(
        [CONTINUED], chat_template=templates[name], continue_final_message=turn == "continue", bos_token="<s>"
    )
    found = ChatTemplate(templates[name], {"bos_token": "<s>"}).render(CONTINUED, turn=turn)
    assert found == expected[0]
    assert found.endswith("The answer is " if name != "trimming" else "The answer is") == (turn == "continue")


def test_a_template_that_hides_the_last_message_cannot_continue_it():
    with pytest.raises(BadRequest) as caught:
        ChatTemplate("{{ messages[0].content }}", {}).render(CONTINUED, turn="continue")
    assert caught.value.param == "continue_final_message"


def test_variables_of_the_client_reach_the_template_but_not_its_own():
    template = ChatTemplate("{{ enable_thinking }} {{ bos_token }} {{ messages | length }}", {"bos_token": "<s>"})
    assert template.render(MESSAGES, {"enable_thinking": False, "messages": []}) == "False <s> 4"
    assert template.render(MESSAGES, {"bos_token": "B", "self": 1}) == " B 4"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nope.nope }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
        "{{ messages[0] + 1 }}",
        "{{ 1 // 0 }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_the_clients_error(template):
    with pytest.raises(BadRequest) as caught:
        ChatTemplate(template, {}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_model_without_template_says_so():
    with pytest.raises(BadRequest, match="chat template"):
        ChatTemplate(None, {}).render(MESSAGES)


def test_a_template_with_a_syntax_error_stops_the_service():
    with pytest.raises(ModelError):
        ChatTemplate("{% for %}", {})


def test_special_tokens_in_both_forms():
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "add_bos_token": True}
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}
