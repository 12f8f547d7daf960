"""Texts are plain English as far as a machine can tell: short sentences, short errors, the field's names."""

import ast
import re

import pytest

from tests.test_readme import ROOT, TEXTS

SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "flow_lightning").rglob("*.py"))
}
NODES = [node for tree in SOURCES.values() for node in ast.walk(tree)]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
#: Names of our own that the field does not use.
UNUSUAL = {"sweep", "look", "told", "joined", "room"}


def sentences(text: str) -> list[str]:
    """The sentences of paragraphs, list items and arguments; code and a link count as one word each."""
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$|^(?:#|\|).*?$", "", text + "\n", flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"::\n\n(?: +.*\n|\n)+", ".\n", text)  # programs
    text = re.sub(r"^ *>>>.*\n(?: *\S.*\n)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]+`", "`x`", text))
    text = re.sub(r"^ *(?:- |\w+: |`x`: |\w+:$)", "\n", text, flags=re.MULTILINE)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [each for paragraph in paragraphs for each in re.split(r"(?<=[.!?])[\"'*)]*\s+", paragraph) if each]


def words(text: str) -> int:
    return sum(re.search(r"\w", word) is not None for word in text.split())


def message(node: ast.AST, constants: dict[str, ast.expr]) -> str:
    """The text of an error, with `x` for what is only known when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return message(node.value, constants)
    return message(constants[node.id], constants) if isinstance(node, ast.Name) and node.id in constants else "x"


@pytest.mark.parametrize("name", ["flow_lightning", *TEXTS])
def test_a_sentence_has_at_most_thirty_words(name):
    docstrings = [ast.get_docstring(node) or "" for node in NODES if isinstance(node, DOCUMENTED)]
    texts = docstrings if name == "flow_lightning" else [(ROOT / name).read_text(encoding="utf-8")]
    found = [sentence for text in texts for sentence in sentences(text)]
    assert [sentence for sentence in found if words(sentence) > 30] == [] and len(found) > 10


def test_an_error_has_at_most_forty_words():
    values = [(node.targets[0], node.value) for node in NODES if isinstance(node, ast.Assign)]
    constants = {
        t.id: v for t, v in values if isinstance(t, ast.Name) and isinstance(v, ast.Constant) and t.id.isupper()
    }
    raised = [node.exc for node in NODES if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    errors = [" ".join(message(argument, constants) for argument in error.args) for error in raised]
    assert [error for error in errors if words(error) > 40] == [] and len(errors) > 100


def test_names_are_those_of_the_field():
    names = {getattr(node, key, None) for node in NODES for key in ("id", "name", "arg", "attr")}
    assert names & UNUSUAL == set() and "weights" in names


def test_each_file_says_what_comes_in_what_goes_out_and_which_file_is_next():
    said = {path: ast.get_docstring(tree) or "" for path, tree in SOURCES.items() if path.name != "__init__.py"}
    assert [
        path for path, text in said.items() if not re.search(r"^In: .* Out: .*\bNext: ", text, re.DOTALL | re.M)
    ] == []


def test_sentences_and_words_are_counted_as_a_reader_does():
    text = "# Title\n\nTake `a b c` of [one link](https://x.y). Then stop!\n\n- An item:\n\n```bash\nrun\n```\n"
    assert [words(sentence) for sentence in sentences(text)] == [5, 2, 2]
    error = ast.parse('raise ValueError(f"The rate is {rate}. " f"{HOW}")').body[0].exc.args[0]
    assert message(error, {"HOW": ast.Constant("Give another.")}) == "The rate is x. Give another."
