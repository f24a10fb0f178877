"""Tool calls and thoughts: read from what models write, and written as grammars demand."""

import json

import pytest

from deserve.model.tools import ARGUMENTS, Answer, dialect, grammar, parse, split_reasoning

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
PARIS = ("weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "of", "content", "calls"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', "hermes", None, [PARIS]),
        (
            'Let me see.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n'
            '<tool_call>{"name": "time", "arguments": {}}</tool_call>',
            "hermes",
            "Let me see.",
            [PARIS, ("time", "{}")],
        ),
        ('<tool_call>{"name": "weather", "arguments": {"city"', "hermes", "all", []),
        ("No call at all.", "hermes", "all", []),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]', "mistral", None, [PARIS]),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time{}', "mistral", None, [PARIS, ("time", "{}")]),
        ('[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{"city": "Paris"}', "mistral", None, [PARIS]),
        ('<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>', "hermes", "all", []),
        ("[TOOL_CALLS]" + "[" * 10**5, "mistral", "all", []),
        ("[" * 10**5, "llama3", "all", []),
        ('{"name": "weather", "parameters": {"city": "Paris"}}', "llama3", None, [PARIS]),
        (
            '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "time", "parameters": {}}',
            "llama3",
            None,
            [PARIS, ("time", "{}")],
        ),
        ('{"city": "Paris"}', "llama3", "all", []),
        ('{"name": "weather", "parameters": {"city": "Paris"}} or so', "llama3", "all", []),
    ],
)
def test_calls_are_read(text: str, of: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    assert parse(text, of) == Answer(text if content == "all" else content, tuple(calls))


def test_ids_of_calls_are_the_same_in_every_run() -> None:
    first, again, other = (Answer(None, (PARIS, PARIS)).tool_calls(name, "hermes") for name in ("a", "a", "b"))
    assert first == again and len({call["id"] for call in [*first, *other]}) == 4
    assert len(Answer(None, (PARIS,)).tool_calls("a", "mistral")[0]["id"]) == 9  # what Mistral's templates take back
    assert first[0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}


@pytest.mark.parametrize("of", sorted(ARGUMENTS))
@pytest.mark.parametrize("tools", [[WEATHER], [WEATHER, TIME]])
def test_grammars_compile(of: str, tools: list[dict[str, object]]) -> None:
    llguidance = pytest.importorskip("llguidance")
    for opening in (None, 5):
        assert llguidance.LLMatcher.validate_grammar(grammar(tools, of, opening)) == ""


def test_the_template_tells_the_dialect() -> None:
    assert dialect("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert dialect("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == "mistral"
    assert dialect("{% if tools is not none %}<|python_tag|>{% endif %}") == "llama3"
    assert dialect("{{ messages }}") is None
    assert dialect("{% if tools %}<tool_call>\n<function=name>{% endif %}") is None


@pytest.mark.parametrize(
    ("text", "opened", "thoughts", "answer"),
    [
        ("<think>\nWell.\n</think>\n\nYes.", False, "Well.", "Yes."),
        ("Well.\n</think>\n\nYes.", True, "Well.", "Yes."),
        ("<think>Well", False, "Well", ""),
        ("Yes.", False, None, "Yes."),
    ],
)
def test_thoughts_are_split_off(text: str, opened: bool, thoughts: str | None, answer: str) -> None:
    assert split_reasoning(text, opened) == (thoughts, answer)


def test_arguments_are_json_text_whatever_their_letters() -> None:
    answer = parse('<tool_call>{"name": "weather", "arguments": {"city": "Zürich \\"x\\""}}</tool_call>', "hermes")
    assert json.loads(answer.calls[0][1]) == {"city": 'Zürich "x"'}
