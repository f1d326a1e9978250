"""Chats as prompts: by the template a model brings, and by the plain one."""

import json
import shutil
from typing import Any

import pytest

from service.engine.chat_template import ChatTemplate
from service.engine.tokenizer import Tokenizer
from service.errors import BadRequestError
from tests.service.conftest import TOKENIZER_DIR

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</{{ message.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello."}]
TURNS = [*HELLO, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    """Of a model that brought one."""
    directory = tmp_path_factory.mktemp("with_template")
    shutil.copy(TOKENIZER_DIR / "tokenizer.json", directory)
    config = json.loads((TOKENIZER_DIR / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.load(directory).chat_template


def test_a_model_s_own_template_writes_the_special_tokens_itself(template):
    assert not template.is_plain
    prompt = template.render(HELLO)
    assert prompt.text == "<|bos|><user>Hello.</user><assistant>"
    assert not prompt.adds_special_tokens
    assert prompt.stop == ()


def test_the_last_turn_can_be_left_open(template):
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(TURNS, **options).text.endswith("<assistant>Hi")
    assert ChatTemplate().render(TURNS, **options).text == "User: Hello.\n\nAssistant: Hi"


def test_variables_reach_the_template_and_what_is_no_variable_is_refused(template):
    assert template.render(HELLO, variables={"mood": "glad"}).text.endswith("<assistant>glad")
    for name in ("chat_template", "tokenize", "tools", "conversation"):
        with pytest.raises(BadRequestError, match=name):
            template.render(HELLO, variables={name: 1})


def test_what_the_template_refuses_is_the_caller_s_mistake(template):
    with pytest.raises(BadRequestError, match="no system turns") as caught:
        template.render([{"role": "system", "content": "x"}])
    assert caught.value.param == "messages"


def test_the_built_in_model_has_the_plain_template():
    template = Tokenizer.load(TOKENIZER_DIR).chat_template
    assert template.is_plain
    prompt = template.render([*TURNS, {"role": "user", "name": "Ann", "content": "Bye"}])
    assert prompt.text == "User: Hello.\n\nAssistant: Hi\n\nAnn: Bye\n\nAssistant:"
    assert prompt.stop == ("\n\nUser:", "\n\nAnn:")
    assert prompt.adds_special_tokens


@pytest.mark.parametrize("kind", ["plain", "own"])
def test_a_turn_is_opened_or_gone_on_with_but_not_both(template, kind):
    chosen = template if kind == "own" else ChatTemplate()
    with pytest.raises(BadRequestError, match="continue_final_message"):
        chosen.render(TURNS, add_generation_prompt=True, continue_final_message=True)
