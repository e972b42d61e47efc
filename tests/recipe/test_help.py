"""The recipe's keys in --help."""

import re

import pytest

from ktray import recipe as recipes
from ktray.recipe import help as keys_help
from ktray.recipe.help import MOST_USED, READ_BY, SECTIONS, keys, shown


def listed(text):
    """(title, keys) of each group, in order."""
    return [
        (block.splitlines()[0], re.findall(r"^  ([a-z_0-9.]+)=.*  \(.+\)$", block, re.MULTILINE))
        for block in text.split("\n\n")
    ]


@pytest.mark.parametrize("job", ["distill", "compare", "tune", "bench", "export"])
def test_every_key_is_there_once_unless_another_job_alone_reads_it(job):
    groups = listed(keys(job))
    assert groups[0] == ("Most used", list(MOST_USED))
    found = [key for _, group in groups for key in group]
    wanted = [row[0] for row in recipes.schema() if READ_BY.get(row[0].split(".")[0], job) == job]
    assert sorted(found) == sorted(wanted)
    own = [name for name, reader in READ_BY.items() if reader == job]
    assert [title.split(":")[0] for title, _ in groups[1 : 1 + len(own)]] == own  # before what all jobs have
    for name, reader in READ_BY.items():
        assert (f"{name}.*: only read by {reader}; see: python jobs/{reader}.py --help" in keys(job)) == (reader != job)


def test_every_section_says_what_it_is_for():
    names = {row[0].split(".")[0] for row in recipes.schema() if "." in row[0]}
    assert names == set(SECTIONS)
    assert set(READ_BY) <= names
    assert all(text[0].isupper() and text.endswith(".") for text in SECTIONS.values())


def test_descriptions_stand_by_themselves():
    """Those of the recipe's rows: no pronoun for another key, no second key that says the same."""
    texts = {key: text for key, _, _, text in recipes.schema() if not key.startswith("objective.")}
    loose = re.compile(r"\b(likewise|the same within|wait for them|beside|as given)\b")
    assert [key for key, text in texts.items() if loose.search(text)] == []
    assert len(set(texts.values())) == len(texts)
    assert [key for key, text in texts.items() if text.endswith(".") and not text.endswith("...")] == []


def test_lines_fit(monkeypatch):
    for columns, most in ((80, 80), (200, 110), (20, 60)):
        monkeypatch.setenv("COLUMNS", str(columns))
        meanings = [line for line in keys("distill").splitlines() if line.startswith("      ")]
        assert max(map(len, meanings)) <= most
        assert keys_help.width() <= most


def test_values_are_shown_as_they_are_written():
    values = [None, False, 7, 0.002, "./ktray-store", ["a", "b"], {"patch_size": 2}, []]
    wanted = ["null", "false", "7", "0.002", "./ktray-store", "[a, b]", "{patch_size: 2}", "[]"]
    assert [shown(value) for value in values] == wanted
    for value, text in zip(values, wanted, strict=True):
        assert recipes.load(None, [f"student.kwargs.x={text}"]).student.kwargs["x"] == value
