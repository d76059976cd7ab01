"""README and docs: each command is one that exists, each number comes from a run, a setting or a paper."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from smaflib import plugins
from smaflib.apps.cli import app
from smaflib.config import CrfConfig, Variant, load_config
from smaflib.explorer.page import MAX_BYTES
from smaflib.files import PROJECT_ROOT

PAGES = {
    path.relative_to(PROJECT_ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT_ROOT / "README.md", PROJECT_ROOT / "CONTRIBUTING.md", *sorted(PROJECT_ROOT.glob("docs/*.md")))
}
TARGETS = set(re.findall(r"^([a-z-]+):", (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
BLOCK = re.compile(r"^```([\w{}]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("smaf", ".venv/bin/smaf", "make", "python", ".venv/bin/python")
EXECUTED = {"README.md": "tests/test_environment.py", "docs/extend.md": "tests/test_extend.py"}
"""Pages with Python, and the test that runs it."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page, text in PAGES.items():
        yield from ((page, code) for kind, code in BLOCK.findall(text) if kind == language)


def lines_of_commands() -> list[tuple[str, str]]:
    """Every line of a block of commands, and of an indented one, with its page."""
    indented = [
        (page, line) for page, text in PAGES.items() for line in re.findall(r"^    (smaf .+)$", text, re.MULTILINE)
    ]
    fenced = [(page, line) for page, code in blocks("") for line in code.splitlines() if not is_table(code)]
    return [*fenced, *indented]


def is_table(code: str) -> bool:
    return code.startswith("image,labels\n")


def commands_in_text() -> list[tuple[str, str]]:
    """What stands in a sentence between backticks and begins with one of the programs."""
    found = []
    for page, text in PAGES.items():
        prose = BLOCK.sub("", text)
        for code in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`", prose):
            if code.split()[0] in PROGRAMS and len(code.split()) > 1:
                found.append((page, code))
    return found


def subcommand(words: list[str]) -> tuple[Any, list[str]]:
    """The command of ``smaf`` that words name, and the words after it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"smaf has no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def settings_of(parameters: dict[str, Any]) -> list[str]:
    given = parameters.get("settings") or []
    return [each for each in given if not each.endswith("=...")]


@pytest.mark.parametrize(("page", "line"), lines_of_commands())
def test_commands_of_blocks_are_complete(page: str, line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program in ("smaf", ".venv/bin/smaf"):
        command, rest = subcommand(words)
        parameters = command.make_context(command.name, rest).params
        config = parameters.get("config")
        if config is not None:
            load_config(PROJECT_ROOT / config, settings_of(parameters))
    elif program == "make":
        assert set(words) <= TARGETS
    elif program == "cp":
        assert all((PROJECT_ROOT / each).exists() for each in words[:-1] if not each.startswith("-"))
    else:
        assert program == ".venv/bin/pip", f"{page}: say in this test how to check {line!r}"
        extra = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        names = [re.split(r"[<>=]", each)[0] for each in words[1:]]
        assert names == [re.split(r"[<>=]", each)[0] for each in extra["cluster"]]


@pytest.mark.parametrize(("page", "code"), commands_in_text())
def test_commands_in_sentences_exist(page: str, code: str) -> None:
    program, *words = shlex.split(code)
    if program == "make":
        assert words[0] in TARGETS
    elif program in ("smaf", ".venv/bin/smaf"):
        command, rest = subcommand(words)
        known = {option for each in command.params for option in each.opts}
        assert {word for word in rest if word.startswith("--")} <= known
    elif words[0] == "-m":
        assert words[1] == "pytest" or (PROJECT_ROOT / f"{words[1].replace('.', '/')}.py").is_file()
    else:
        source = (PROJECT_ROOT / words[0]).read_text(encoding="utf-8")
        assert [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in source] == []


def test_python_of_pages_is_executed_by_the_tests_named_here() -> None:
    assert {page for page, _ in blocks("python")} == set(EXECUTED)
    for page, test in EXECUTED.items():
        assert Path(page).name in (PROJECT_ROOT / test).read_text(encoding="utf-8")


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    kinds = {kind for text in PAGES.values() for kind, _ in BLOCK.findall(text)}
    assert kinds == {"", "python", "toml", "bibtex", "{toctree}"}  # toctree: tests/test_environment.py


def test_entry_points_of_the_page_are_groups_of_the_library() -> None:
    ((page, code),) = blocks("toml")
    points = tomllib.loads(code)["project"]["entry-points"]
    kinds = {kind.group: kind for kind in vars(plugins).values() if isinstance(kind, plugins.Kind)}
    for group, names in points.items():
        assert group in kinds
        assert all(kinds[group].is_own(value) for value in names.values())
    assert all(f"`{group}`" in PAGES[page] for group in kinds)


def test_citation_of_the_readme_is_that_for_programs() -> None:
    ((_, code),) = blocks("bibtex")
    citation = (PROJECT_ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for name in ("doi", "version"):
        for value in re.findall(rf"^  {name} += {{(.+)}}", code, re.MULTILINE):
            assert value in citation, name


def test_table_of_own_photos_is_read() -> None:
    tables = [code for _, code in blocks("") if is_table(code)]
    assert tables and all(len(line.split(",")) == 2 for code in tables for line in code.splitlines())


# ------------------------------------------------------------------------------------------------------------- numbers

OTHERS = ("docs/own_photos.md", "docs/gpu.md", "docs/robustness.md", "docs/processes.md", "docs/scale_out.md")
"""Pages whose tables tests/test_environment.py compares with their benchmarks' numbers."""

NUMBER = re.compile(
    r"\d+\.\d+|\d[\d,]*(?: |-)?(?:ms|s|min|minutes?|MB|GB|kB|%|points?|seconds?|hours?|photos|images)\b"
)


def prose(text: str) -> str:
    """What people have written: without tables of commands, code, addresses and names of papers."""
    text = re.sub(r"<!-- (\w+) made by.*?<!-- end of \1 made by.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", BLOCK.sub("", text))
    return re.sub(r"\]\([^)]*\)|arXiv:? ?[\d.]+|Python:? \d\.\d+", "", text)


def listed(name: str) -> int:
    return len((PROJECT_ROOT / "configs" / "lists" / name).read_text(encoding="utf-8").split())


def paper(variant: Variant) -> float:
    results = load_config(PROJECT_ROOT / "configs" / "voc12.yaml").evaluation.paper_results
    return results[variant]


def gains(claim: str) -> tuple[str, str]:
    """Of the table of claims, what a claim is worth on photos: with saliency maps, and in plain mode."""
    (line,) = (line for line in PAGES["docs/claims.md"].splitlines() if line.startswith(f"| {claim}"))
    with_maps, plain = (cell.split(" (")[0].removeprefix("+") for cell in line.split(" | ")[2:4])
    return with_maps, plain


def own_masks() -> str:
    """How good the masks of somebody's own photos are, by the recipe that was chosen: of the held-out folders."""
    final = PAGES["docs/own_photos.md"].split("<!-- end of final")[0]
    (line,) = (line for line in final.splitlines() if line.startswith("| chosen"))
    return line.split(" | ")[5]


MINI = load_config(PROJECT_ROOT / "configs" / "mini.yaml")
SMALL, LARGE = (f"{100 * limit:g} %" for limit in MINI.evaluation.size_limits)
PHOTOS = f"{listed('voc12_small_train.txt')} photos"
CHECKED: dict[str, Callable[[], list[str]]] = {
    "README.md": lambda: [
        PHOTOS,
        f"{listed('voc12_small_val.txt')} others",
        "by {1} there, by {0} with them".format(*gains("a student surpasses its teacher")),
        f"{paper(Variant.SEGMENTATION):g} on VOC",
        f"they reach {own_masks()} mIoU",
    ],
    "docs/claims.md": lambda: [PHOTOS, f"{paper(Variant.SEGMENTATION):g} on val and test"],
    "docs/explorer.md": lambda: [f"at most {MAX_BYTES / 1e6:g} MB"],
    "docs/mini_results.md": lambda: [
        f"{MINI.data.num_train} + {MINI.data.num_val} images of {MINI.data.image_size} pixels",
        f"below {SMALL} of",
        f"from {LARGE} on",
    ],
    "docs/refinement.md": lambda: [
        f"labels, {CrfConfig().gt_prob:g} sure",
        f"to the power {CrfConfig.model_validate('soft').sharpness:g}",
    ],
    "docs/scaling.md": lambda: [f"a run of {PHOTOS} of VOC", f"measured on {PHOTOS}"],
    "docs/voc_and_coco.md": lambda: [
        f"{PHOTOS} to learn from, {listed('voc12_small_val.txt')} to validate",
        "paper results "
        + ", ".join(
            f"{paper(each):g}"
            for each in (
                Variant.TEACHER_FUSED,
                Variant.TEACHER_FUSED_REFINED,
                Variant.PSEUDO_MASKS,
                Variant.SEGMENTATION,
            )
        ),
    ],
}
"""What pages say in words, from where it comes."""
SAID = {
    "CONTRIBUTING.md": ["at most 6 MB"],  # tests/test_export_reference_run.py
    "docs/mini_results.md": ["about 2.5 times its ±"],  # Student's t of two degrees of freedom, roughly
    "docs/refinement.md": [
        # the table of presets, compared in tests/test_environment.py
        *("| 1.5/3 | 20/8/6 |", "| 1.5/1 | 20/8/6 |"),
    ],
    "docs/scaling.md": ["4 kB of disk each"],  # the smallest piece of a disk that ext4 gives a file
    "docs/voc_and_coco.md": ["ResNet38"],
}
"""What else has a number, and why that is right."""


@pytest.mark.parametrize("page", CHECKED)
def test_numbers_in_sentences_are_those_of_their_source(page: str) -> None:
    text = " ".join(PAGES[page].split())
    assert [phrase for phrase in CHECKED[page]() if phrase not in text] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OTHERS and page != "docs/voc12_small.md"])
def test_no_number_stands_in_a_sentence_without_a_source(page: str) -> None:
    text = " ".join(prose(PAGES[page]).split())
    for phrase in [*CHECKED.get(page, list)(), *SAID.get(page, [])]:
        text = text.replace(phrase, "")
    assert NUMBER.findall(text) == []
