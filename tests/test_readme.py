"""What the documentation says against what is there: links, folders, files, recipe keys, commands, and its English."""

from __future__ import annotations

import ast
import re
import shlex
import urllib.parse
from pathlib import Path

import pytest

import ktray.recipe
from ktray import cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOW_TO = [README, *sorted((ROOT / "docs" / "guide").rglob("*.md"))]
# Every file with text that a person reads, the CHANGELOG apart, which tells of old versions in their own words.
TEXTS = [
    *PAGES,
    *sorted(p for p in (ROOT / "ktray").rglob("*") if p.suffix in (".py", ".md", ".yaml", ".html", ".css")),
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n)+")
INLINE = re.compile(r"`([^`\n]+)`")
# A key whose values have names of their own, such as prices.H100.
OPEN_KEYS = ("student.kwargs", "prices", "mlflow.tags")

# Sentences of earlier versions that were correct but not standard English, each with the fault that it stands for.
FORBIDDEN = (
    r"knows a great deal",
    r"dear",
    r"left out and said",
    r"gone on with",
    r"the same likewise",
    r"GPUs likewise",
    r"counts? nothing spent",
    r"their worth stands in",
    r"its list of those that are none",
    r"look(?:s|ed)? in it for their like",
    r"how many a run bears",
    r"can be used no more",
    r"is told once",
    r"another of its shard stands in",
    r"came to no end",
    r"are told in one line",
    r"stores that pass over",
    r"how long to wait for them",
    r"null keeps images that show the same",
    r"which asks for \S+ times",
    r"the recipe as given",
    r"goes on from step",
    r"the machine was not calm",
    r"it ends with 0 where there are none",
    r"(?:as|that) memory bears",
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """The text on one line: sentences are broken over lines of a page, of a comment and of a string in the code."""
    text = re.sub(r"[\"'][ \t]*\n\s*[rbf]{0,2}[\"']", "", text)  # "one " "string"
    text = re.sub(r"\n[ \t]*#+[ \t]?", " ", text)
    return re.sub(r"\s+", " ", text)


def forbidden_in(text: str) -> list[str]:
    line = prose(text)
    return [pattern for pattern in FORBIDDEN if re.search(rf"(?<!\w){pattern}(?!\w)", line, re.IGNORECASE)]


def without_code(text: str) -> str:
    return INLINE.sub("", FENCE.sub("", text))


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that are files of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lines(block: str) -> list[str]:
    """The lines of a block; those of one command are joined (a backslash at the end, or a quotation that is open)."""
    found: list[str] = []
    is_open = False
    for line in block.replace("\\\n", " ").splitlines():
        found[-1:] = [f"{found[-1]} {line}"] if is_open else [*found[-1:], line]
        try:
            shlex.split(found[-1], comments=True)
            is_open = False
        except ValueError:
            is_open = True
    return found


def code(page: Path) -> list[str]:
    """Every piece of code of a page: the commands and lines of its blocks, and its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = [match for pattern in (FENCE, INDENTED) for match in pattern.findall(text)]
    inline = [piece.replace("\\|", "|") for piece in INLINE.findall(FENCE.sub("", text))]
    return [*(line for block in blocks for line in lines(block)), *inline]


def words(command: str) -> list[str]:
    """The arguments of the last job that a command line starts; [] where it starts none."""
    found = re.search(r".*jobs/\w+\.py(.*)", command, re.DOTALL)
    if not found:
        return []
    return shlex.split(re.split(r"&&|;| \| ", found[1])[0], comments=True)


def keys(page: Path) -> set[str]:
    """Recipe keys: all that follow a job in a command, and those with a section's name in other code."""
    sections = {row[0].split(".")[0] for row in ktray.recipe.schema() if "." in row[0] or row[0] in OPEN_KEYS}
    found: set[str] = set()
    for piece in code(page):
        found |= {word.partition("=")[0] for word in words(piece) if "=" in word and not word.startswith("-")}
        for key in re.findall(r"(?<![\w.])(\w+(?:\.\w+)+)=(?!=)", piece):
            if key.split(".")[0] in sections:
                found.add(key)
    return found


def is_key(key: str) -> bool:
    return key in {row[0] for row in ktray.recipe.schema()} or key.startswith(tuple(f"{k}." for k in OPEN_KEYS))


def folder_map() -> dict[str, str]:
    """Folder of ktray/ to its line, from the README's map."""
    block = next(block for block in FENCE.findall(README.read_text(encoding="utf-8")) if block.startswith("ktray/\n"))
    return dict(re.findall(r"^ {2}(\w+)/ +(\S.*)$", block, re.MULTILINE))


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 145


def test_the_readme_begins_with_the_commands_to_run_and_to_test() -> None:
    run, test = FENCE.findall(README.read_text(encoding="utf-8"))[:2]
    assert run == "python3 -m ktray.bootstrap && .venv/bin/python jobs/distill.py\n"
    assert test == "python3 -m ktray.bootstrap --dev && .venv/bin/python -m pytest -n 2\n"


def test_every_folder_is_in_the_map_of_the_code() -> None:
    there = {path.name for path in (ROOT / "ktray").iterdir() if any(path.glob("*.py"))}
    assert set(folder_map()) == there


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = urllib.parse.unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in links(page)
        if target.partition("#")[0]
    }
    assert [name(page) for page in PAGES if page != README and page not in linked] == []


@pytest.mark.parametrize("page", HOW_TO, ids=name)
def test_recipe_keys_are_in_the_schema(page: Path) -> None:
    assert [key for key in sorted(keys(page)) if not is_key(key)] == []


def test_commands_of_the_readme_are_understood() -> None:
    commands = [piece for piece in code(README) if "jobs/" in piece and words(piece) and "*" not in piece]
    assert len(commands) >= 7
    short = {"--only": "bench.only=[{}]", "--quick": "bench.quick=true", "--json": "bench.json_file={}"}
    for command in commands:
        job = re.findall(r"jobs/(\w+)\.py", command)[-1]
        assert (ROOT / "jobs" / f"{job}.py").exists()
        arguments = cli.parse(words(command), short if job == "bench" else None)
        ktray.recipe.load(arguments.recipes, arguments.overrides)  # raises KtrayError


def diagrams() -> list[str]:
    return [block for block in FENCE.findall(ARCHITECTURE.read_text(encoding="utf-8")) if "|\n" in block]


def test_files_in_the_pictures_of_the_architecture_exist() -> None:
    missing = []
    for block in diagrams():
        paths = re.findall(r"^[ \t]*((?:\w+/)+\w+\.py)\b", block, re.MULTILINE)
        assert len(paths) > 5
        missing += [p for p in paths if not (ROOT / p).exists() and not (ROOT / "ktray" / p).exists()]
    assert len(diagrams()) == 3
    assert missing == []


def test_the_layers_of_the_architecture_are_those_that_are_tested() -> None:
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    pinned = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS"
    )
    rows = re.findall(r"^\| \d+ \| (.+) \|$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = [tuple(INLINE.findall(row)) for row in rows]
    assert [sorted(layer) for layer in reversed(listed)] == [sorted(layer) for layer in pinned]


def places() -> list[str]:
    """Folders in which the architecture page says that a thing is added."""
    table = ARCHITECTURE.read_text(encoding="utf-8").partition("## Where to add what")[2]
    return sorted({Path(path).parent.as_posix() for path in re.findall(r"`(ktray/[\w/]+/(?:NAME|JOB)\.\w+)`", table)})


@pytest.mark.parametrize("place", places())
def test_things_are_added_in_folders_that_exist(place: str) -> None:
    assert (ROOT / place).is_dir()


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_the_english_is_plain(path: Path) -> None:
    assert forbidden_in(path.read_text(encoding="utf-8")) == []


def test_a_forbidden_phrase_is_found_wherever_it_is_broken() -> None:
    assert forbidden_in("what was left is gone\non with") == ["gone on with"]
    assert forbidden_in('say("it is gone on "\n    f"with")') == ["gone on with"]
    assert forbidden_in("# The recipe\n    # as given is first") == ["the recipe as given"]
    assert forbidden_in("an endearing name") == []


def test_a_wrong_key_and_a_wrong_link_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, of two\n[a](missing.md#x) and [b](page.md#a-page-of-two) and [c](https://example.com)\n\n"
        "```\n.venv/bin/python jobs/distill.py \\\n    train.stepz=5 'student.kwargs={a: 1}' && echo x=1\n```\n"
        "`teach.viewz=4`, `prices.H100=2`, `mlflow.log(a=1)`, `jobs/tune.py sed=1`\n\n"
        '    python jobs/compare.py "compare.wayz={\n      one: {objective.name: oriented}}" seed=1\n'
    )
    assert links(page) == ["missing.md#x", "page.md#a-page-of-two"]
    assert anchors(page) == {"a-page-of-two"}
    assert keys(page) == {"train.stepz", "student.kwargs", "teach.viewz", "prices.H100", "sed", "compare.wayz", "seed"}
    assert [key for key in sorted(keys(page)) if not is_key(key)] == [
        "compare.wayz",
        "sed",
        "teach.viewz",
        "train.stepz",
    ]
