"""The app's MCP tools, called as an agent calls them; and the option that offers them."""

import ast
import base64
import importlib.util
import json
import urllib.request
from pathlib import Path

import pytest

from blip2.ui import main

ROOT = Path(__file__).resolve().parent.parent
PICTURE = (
    "data:image/png;base64," + base64.b64encode((ROOT / "examples" / "scene-1.png").read_bytes()).decode()
)
QUESTION = "is there a star?"
CALLS = {
    "caption": {"image": PICTURE, "num_captions": 2},
    "answer": {"image": PICTURE, "question": QUESTION},
    "chat": {"image": PICTURE, "messages": [{"role": "user", "content": QUESTION}]},
    "compare": {"image": PICTURE, "question": QUESTION},
    "match": {"image": PICTURE, "texts": ["a red star", "a blue square"]},
}


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["--mcp"])
    assert stop.value.code == 2
    assert '-m pip install "gradio[mcp]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("mcp", reason='MCP is an extra: pip install "gradio[mcp]"')
    from serving import serving

    with serving("--mcp") as app:
        yield app


@pytest.fixture
def call(served):
    """Call tools in a session: name, arguments -> (failed, text), or the list of tools without a name."""
    import anyio
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk(name, arguments):
        address = f"{served.url}/gradio_api/mcp/"
        async with streamablehttp_client(address) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            if name is None:
                return (await session.list_tools()).tools
            result = await session.call_tool(name, arguments)
            [content] = result.content
            return result.isError, content.text

    return lambda name=None, arguments=None: anyio.run(talk, name, arguments)


def test_the_tools_are_ours_alone_and_described(served, call):
    tools = {tool.name: tool for tool in call()}
    assert set(tools) == set(CALLS)
    for name, tool in tools.items():
        properties = tool.inputSchema["properties"]
        assert len(tool.description) > 40 and "image" in tool.inputSchema["required"]
        assert set(CALLS[name]) <= set(properties)
        assert all(text["description"] and isinstance(text["type"], str) for text in properties.values())
    assert tools["match"].inputSchema["properties"]["texts"]["items"] == {"type": "string"}
    with urllib.request.urlopen(f"{served.url}/gradio_api/mcp/schema") as answer:
        assert {tool["name"] for tool in json.load(answer)} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_each_tool_answers(call, name):
    failed, text = call(name, CALLS[name])
    assert not failed, text
    if name in ("answer", "chat"):
        return  # a random model's text, it may be empty
    values = ast.literal_eval(text)  # gradio writes lists as Python does
    assert len(values) == 2
    if name == "compare":
        assert [row["model"] for row in values] == ["scenes-opt", "scenes-flan-t5"]
        assert all(QUESTION in row["prompt"] for row in values)
    if name == "match":
        assert {row["text"] for row in values} == {"a red star", "a blue square"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": " "}, "There is nothing to ask yet"),
        ({"model": "nope"}, "unknown model 'nope'"),
        ({"image": "http://127.0.0.1/x.png"}, "Only uploaded pictures"),
        ({"image": "data:image/png;base64,AAAA"}, "is not an image that can be opened"),
    ],
)
def test_agents_get_a_sentence(call, changes, words):
    failed, text = call("answer", CALLS["answer"] | changes)
    assert failed and words in text
