"""Tables of bad requests, each with its exact answer, for every route that generates.

What no HTTP client can send is in ``tests/service/test_connection.py``.
"""

import json
from typing import Any

import pytest

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
ROUTES = (GENERATE, COMPLETIONS, CHAT)
PRIVATE = "the-prompt-nobody-may-log"
MEGABYTE = "a" * 2**20
JSON = "application/json"


def fields(**values: Any) -> bytes:
    return json.dumps({"prompt": PRIVATE, **values}).encode()


def raw(text: str) -> bytes:
    """Fields as they are written, behind the prompt."""
    return f'{{"prompt": "{PRIVATE}", {text}}}'.encode()


# What it is: the body, the status, and the field that is named.
BODIES: dict[str, tuple[Any, int, str | None]] = {
    # not JSON, or not an object
    "empty": (b"", 400, None),
    "not JSON": (b"prompt=" + PRIVATE.encode(), 400, None),
    "cut off": (b'{"prompt": "' + PRIVATE.encode(), 400, None),
    "null": (b"null", 400, None),
    "a list": (b"[" + fields() + b"]", 400, None),
    "a string": (json.dumps(PRIVATE).encode(), 400, None),
    "a number": (b"1", 400, None),
    "two values": (fields() + fields(), 400, None),
    "a comma at the end": (raw('"n": 1,'), 400, None),
    "single quotes": (b"{'prompt': 'x'}", 400, None),
    "a comment": (raw('/* */ "n": 1'), 400, None),
    "NUL behind it": (fields() + b"\x00", 400, None),
    # encodings
    "a byte order mark": (b"\xef\xbb\xbf" + fields(), 400, None),
    "UTF-16": (fields().decode().encode("utf-16"), 400, None),
    "UTF-32": (fields().decode().encode("utf-32"), 400, None),
    "Latin-1": ('{"prompt": "é"}'.encode("latin-1"), 400, None),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400, None),
    "an overlong form": (b'{"prompt": "\xc0\xaf"}', 400, None),
    "a surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', 400, None),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', 400, None),
    "its other half": (b'{"prompt": "\\udc00 x"}', 400, None),
    "a control character in a string": (b'{"prompt": "\x01"}', 400, None),
    # numbers
    "NaN": (raw('"temperature": NaN'), 400, None),
    "Infinity": (raw('"temperature": Infinity'), 400, None),
    "-Infinity": (raw('"top_p": -Infinity'), 400, None),
    "a float beyond all": (raw('"temperature": 1e999'), 400, None),
    "an integer of 400 digits": (raw('"max_tokens": ' + "9" * 400), 400, None),
    "an integer of 100,000 digits": (raw('"max_tokens": ' + "9" * 100_000), 400, None),
    "an integer beyond 64 bits": (raw('"max_tokens": 18446744073709551616'), 400, "max_tokens"),
    "a seed beyond 64 bits": (raw('"seed": 9223372036854775808'), 400, "seed"),
    "a hexadecimal number": (raw('"n": 0x1'), 400, None),
    "a leading zero": (raw('"n": 01'), 400, None),
    # structure
    "100,000 lists deep": (raw('"stop": ' + "[" * 100_000 + "]" * 100_000), 400, None),
    "5,000 objects deep": (raw('"x": ' + '{"a":' * 5000 + "1" + "}" * 5000), 400, None),
    "1,000 objects deep": (
        raw('"method_params": ' + '{"a":' * 1000 + "1" + "}" * 1000),
        400,
        None,
    ),
    "a name twice": (raw('"n": 1, "n": 2'), 400, "n"),
    "the prompt twice": (raw('"prompt": "other"'), 400, "prompt"),
    "a name twice, spelt differently": (raw('"n": 1, "\\u006e": 1'), 400, "n"),
    "a name twice inside": (raw('"method_params": {"a": 1, "a": 1}'), 400, "a"),
    "500,000 unknown names": (
        b"{" + b",".join(b'"x%d":1' % i for i in range(500_000)) + b"}",
        400,
        "x0",
    ),
    "a name of 1 MB": (fields(**{MEGABYTE: 1}), 400, "a" * 64),
    "a name of control characters": (raw('"\\u0000\\u001b": 1'), 400, "\0\x1b"),
    "an empty name": (raw('"": 1'), 400, ""),
    "__proto__": (raw('"__proto__": {}'), 400, "__proto__"),
    "a misspelt name": (fields(max_token=5), 400, "max_token"),
    # types
    "a number as the prompt": (fields(prompt=5), 400, "prompt"),
    "a list as the prompt": (fields(prompt=[PRIVATE]), 400, "prompt"),
    "an object as the prompt": (fields(prompt={"text": PRIVATE}), 400, "prompt"),
    "no prompt": (b"{}", 400, "prompt"),
    "null as the prompt": (fields(prompt=None), 400, "prompt"),
    "an empty prompt": (fields(prompt=""), 400, "prompt"),
    "both prompts": (fields(prompt_token_ids=[1]), 400, "prompt"),
    "a number as a string": (fields(max_tokens="5"), 400, "max_tokens"),
    "a boolean as a number": (fields(max_tokens=True), 400, "max_tokens"),
    "a fraction of a token": (fields(max_tokens=1.5), 400, "max_tokens"),
    "a string as a boolean": (fields(stream="true"), 400, "stream"),
    "a number as a boolean": (fields(ignore_eos=1), 400, "ignore_eos"),
    "null as a number": (fields(temperature=None), 400, "temperature"),
    "an object as a number": (fields(seed={}), 400, "seed"),
    "a list as a method": (fields(method=["dense"]), 400, "method"),
    "a list of knobs": (fields(method_params=[1]), 400, "method_params"),
    "a string of knobs": (fields(method_params="{}"), 400, "method_params"),
    "an unknown detail": (fields(sparsity_detail="all"), 400, "sparsity_detail"),
    # ranges
    "no tokens": (fields(max_tokens=0), 400, "max_tokens"),
    "fewer than no tokens": (fields(max_tokens=-1), 400, "max_tokens"),
    "more tokens than ids": (fields(max_tokens=2**31), 400, "max_tokens"),
    "a least above the most": (fields(min_tokens=200), 400, "min_tokens"),
    "a cold temperature": (fields(temperature=-1e-9), 400, "temperature"),
    "a hot temperature": (fields(temperature=2.0001), 400, "temperature"),
    "no mass": (fields(top_p=0), 400, "top_p"),
    "more than all mass": (fields(top_p=1.0001), 400, "top_p"),
    "top_k of -2": (fields(top_k=-2), 400, "top_k"),
    "min_p of 2": (fields(min_p=2), 400, "min_p"),
    "a penalty of 0": (fields(repetition_penalty=0), 400, "repetition_penalty"),
    "a penalty of 3": (fields(presence_penalty=3), 400, "presence_penalty"),
    "a penalty of -3": (fields(frequency_penalty=-3), 400, "frequency_penalty"),
    "no choices": (fields(n=0), 400, "n"),
    "a million choices": (fields(n=10**6), 400, "n"),
    "two choices of the same": (fields(n=2, temperature=0), 400, "n"),
    "a thousand log-probabilities": (fields(logprobs=1000), 400, "logprobs"),
    # lists
    "10,000 stop strings": (fields(stop=["x"] * 10_000), 400, "stop"),
    "a stop string of 1 MB": (fields(stop=MEGABYTE), 400, "stop"),
    "an empty stop string": (fields(stop=["x", ""]), 400, "stop"),
    "stop strings in a list": (fields(stop=[["x"]]), 400, "stop"),
    "10,000 stop tokens": (fields(stop_token_ids=[1] * 10_000), 400, "stop_token_ids"),
    "a negative stop token": (fields(stop_token_ids=[-1]), 400, "stop_token_ids"),
    "no prompt tokens": (b'{"prompt_token_ids": []}', 400, "prompt_token_ids"),
    "a negative token": (b'{"prompt_token_ids": [-1]}', 400, "prompt_token_ids"),
    "a token beyond 31 bits": (b'{"prompt_token_ids": [2147483648]}', 400, "prompt_token_ids"),
    "a token in words": (b'{"prompt_token_ids": ["a"]}', 400, "prompt_token_ids"),
    "a token that is true": (b'{"prompt_token_ids": [true]}', 400, "prompt_token_ids"),
    "100,000 tokens in words": (
        json.dumps({"prompt_token_ids": ["x"] * 100_000}).encode(),
        400,
        "prompt_token_ids",
    ),
    "tokens as a string": (b'{"prompt_token_ids": "1,2"}', 400, "prompt_token_ids"),
    "a prompt too long for the context": (fields(prompt="x " * 1000), 400, "prompt"),
    # methods
    "an unknown method": (fields(method="nope"), 400, "method"),
    "an empty method": (fields(method=""), 400, "method"),
    "a method of 1 MB": (fields(method=MEGABYTE), 400, "method"),
    "a method of control characters": (fields(method="\x1b[31m\r\nX: y\0"), 400, "method"),
    "a method that is a path": (fields(method="../../etc/passwd"), 400, "method"),
    "a method that is a module": (fields(method="sparse_methods.registry"), 400, "method"),
    "an unknown version": (fields(method="dense", version="v99"), 400, "version"),
    "a version of 1 MB": (fields(method="dense", version=MEGABYTE), 400, "version"),
    "a version of control characters": (fields(method="dense", version="v1\0"), 400, "version"),
    "an unknown knob": (fields(method_params={"nope": 1}), 400, "method_params"),
    "a knob's name of 1 MB": (fields(method_params={MEGABYTE: 1}), 400, "method_params"),
    "a knob out of bounds": (fields(method_params={"sink_blocks": -1}), 400, "method_params"),
    "a knob of the wrong type": (fields(method_params={"sink_blocks": "1"}), 400, "method_params"),
    "a knob deep down": (
        fields(method_params={"sink_blocks": {"a": [{}]}}),
        400,
        "method_params",
    ),
    # size
    "9 MB": (fields(prompt="x" * 9_000_000), 413, None),
}


# What it is: the query, and the parameter that is named.
QUERIES: dict[str, tuple[str, str]] = {
    "an unknown method": ("method=nope", "method"),
    "an empty method": ("method=", "method"),
    "a method twice": ("method=dense&method=dense", "method"),
    "a method that is not UTF-8": ("method=%ff%fe", "method"),
    "a method with NUL": ("method=dense%00", "method"),
    "a method with a line break": ("method=dense%0d%0aX-Injected:%20yes", "method"),
    "a method of 60 kB": ("method=" + "a" * 60_000, "method"),
    "a version of 60 kB": ("method=dense&version=" + "1" * 60_000, "version"),
    "an unknown version": ("method=dense&version=v99", "version"),
    "a version without its v": ("method=dense&version=1", "version"),
    "an unknown parameter": ("metod=dense", "metod"),
    "the prompt in the query": ("prompt=" + PRIVATE, "prompt"),
    "a parameter of 60 kB": ("a" * 60_000 + "=1", "a" * 64),
    "a parameter with a line break": ("%0d%0aX-Injected:%20yes=1", "\r\nX-Injected: yes"),
}


# What it is: the headers.
HEADERS: dict[str, dict[str, str]] = {
    "no content type": {},
    "plain text": {"Content-Type": "text/plain"},
    "a form": {"Content-Type": "application/x-www-form-urlencoded"},
    "a form of parts": {"Content-Type": "multipart/form-data; boundary=x"},
    "something like JSON": {"Content-Type": "application/json-seq"},
    "a content type of 30 kB": {"Content-Type": "a" * 30_000},
    "gzip": {"Content-Type": JSON, "Content-Encoding": "gzip"},
    "a bomb": {"Content-Type": JSON, "Content-Encoding": "gzip, gzip, br"},
}


# Where OpenAI's fields are others: null is as good as none, and prompts may come in a list.
TAKEN = {
    COMPLETIONS: {"null as a number", "a list as the prompt"},
    CHAT: {"null as a number", "a least above the most"},  # a chat has no least limit of its own
}
NAMED = {
    COMPLETIONS: {"both prompts": "prompt_token_ids"},
    CHAT: {"no prompt": "messages"},
}
PROMPT = f'"prompt": "{PRIVATE}"'.encode()
MESSAGES = f'"messages": [{{"role": "user", "content": "{PRIVATE}"}}]'.encode()


def messages(*turns: Any, **values: Any) -> bytes:
    return json.dumps({"messages": turns, **values}).encode()


def turn(**values: Any) -> dict[str, Any]:
    return {"role": "user", "content": PRIVATE, **values}


# The same for what only a chat has.
CHATS: dict[str, tuple[bytes, int, str | None]] = {
    "no turns": (messages(), 400, "messages"),
    "a text as the turns": (b'{"messages": "' + PRIVATE.encode() + b'"}', 400, "messages"),
    "a turn that is a text": (messages(PRIVATE), 400, "messages"),
    "a turn without a role": (messages({"content": PRIVATE}), 400, "messages"),
    "an unknown role": (messages(turn(role="root")), 400, "messages"),
    "a role of 1 MB": (messages(turn(role=MEGABYTE)), 400, "messages"),
    "a tool's turn": (messages(turn(role="tool")), 400, "messages"),
    "a number as content": (messages(turn(content=5)), 400, "messages"),
    "content 1,000 lists deep": (
        b'{"messages": [{"role": "user", "content": ' + b"[" * 1000 + b"]" * 1000 + b"}]}",
        400,
        None,
    ),
    "an image": (
        messages(turn(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])),
        400,
        "messages",
    ),
    "an unknown name in a turn": (messages(turn(surprise=1)), 400, "messages"),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        None,
    ),
    "tools": (messages(turn(), tools=[{"type": "function"}]), 400, "tools"),
    "a template": (messages(turn(), chat_template="{{ 1 }}"), 400, "chat_template"),
    "two limits that cannot be": (
        messages(turn(), max_completion_tokens=1, min_tokens=2),
        400,
        "min_tokens",
    ),
    "100,000 turns too many": (messages(*[turn()] * 100_000), 400, "messages"),
}


def body_for(route: str, body: bytes) -> bytes:
    return body.replace(PROMPT, MESSAGES) if route == CHAT else body


def table() -> list[Any]:
    """(route, body, status, param): what says nothing of a prompt is sent to chats, too."""
    rows = []
    for route in ROUTES:
        for name, (body, status, param) in BODIES.items():
            sent = body_for(route, body)
            is_about_prompts = route == CHAT and b'"prompt' in sent[:200]
            if is_about_prompts or name in TAKEN.get(route, ()):
                continue
            named = NAMED.get(route, {}).get(name, param)
            rows.append(pytest.param(route, sent, status, named, id=f"{route}-{name}"))
    rows += [pytest.param(CHAT, *row, id=f"{CHAT}-{name}") for name, row in CHATS.items()]
    return rows
