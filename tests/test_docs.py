"""README and docs: commands exist, links lead somewhere, the README's Python runs, the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers import network_references
from PIL import Image

from smaflib.apps.cli import app
from smaflib.config import CRF_PRESETS, CrfConfig, load_config
from smaflib.files import PROJECT_ROOT

PAGES = {
    path.relative_to(PROJECT_ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT_ROOT / "README.md", PROJECT_ROOT / "CONTRIBUTING.md", *sorted(PROJECT_ROOT.glob("docs/*.md")))
}
TARGETS = set(re.findall(r"^([a-z-]+):", (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
BLOCK = re.compile(r"^```([\w{}]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMAF = ("smaf", ".venv/bin/smaf")


def commands() -> list[tuple[str, str]]:
    """(page, command), from blocks of commands and from backticks in sentences."""
    found = []
    for page, text in PAGES.items():
        blocks = [code for kind, code in BLOCK.findall(text) if not kind and not code.startswith("image,labels\n")]
        lines = [line for code in blocks for line in code.splitlines()]
        lines += re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`", BLOCK.sub("", text))
        found += [(page, line) for line in lines if len(line.split()) > 1]
    return [(page, line) for page, line in found if line.split()[0] in (*SMAF, "make", "python")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page: str, line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        assert words[0] in TARGETS
    elif program in SMAF:
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words:
            command, words = command.commands[words[0]], words[1:]
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options
        settings = [words[index + 1] for index, word in enumerate(words[:-1]) if word == "--set"]
        settings = [each for each in settings if not each.endswith("=...")]
        if words and words[0].endswith(".yaml"):
            load_config(PROJECT_ROOT / words[0], settings)
    else:
        words = words[1:] if words[0] == "-m" else words
        assert words[0] == "pytest" or (PROJECT_ROOT / f"{words[0].removesuffix('.py').replace('.', '/')}.py").is_file()


def test_files_that_texts_name_exist() -> None:
    texts = PAGES | {path.name: path.read_text(encoding="utf-8") for path in PROJECT_ROOT.glob("configs/*.yaml")}
    for page, text in texts.items():
        # A file of an earlier commit is named together with it.
        text = re.sub(r"`[\w/.]+` of commit `\w+`|`e335c90`, whose `[\w/.]+`", "", text)
        named = re.findall(r"\b(?:smaflib|minidata|tests|tools|benchmarks|configs)/[\w/.-]+\.\w+", text)
        assert [name for name in named if not (PROJECT_ROOT / name).is_file()] == [], page


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for address in re.findall(r"\]\(([^)\s]+)\)", text):
            if address.startswith("https://"):
                continue
            name, _, heading = address.partition("#")
            target = ((PROJECT_ROOT / page).parent / name).resolve() if name else PROJECT_ROOT / page
            assert target.exists(), f"{page}: {address}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8") if heading else "", re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
            assert not heading or heading in anchors, f"{page}: {address}"


def test_sizes_of_the_texts() -> None:
    words = {page: len(text.split()) for page, text in PAGES.items()}
    assert words["README.md"] <= 850
    assert sum(words.values()) <= 13_500
    assert len([page for page in PAGES if page.startswith("docs/")]) <= 10


def test_python_of_the_readme_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (printed,) = re.findall(r"```text\n(.*?)```", PAGES["README.md"], re.DOTALL)
    expected, found = (
        re.fullmatch(r"(.+): (\d+)% of the photo\n", text) for text in (printed, capsys.readouterr().out)
    )
    assert expected and found and found[1] == expected[1]
    assert int(found[2]) == pytest.approx(int(expected[2]), abs=1)
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.width > 7 * 200


def test_classifier_of_the_page_is_wrapped_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(import torchvision\n.*?)```", PAGES["docs/extend.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 96), (90, 120, 30)).save("photo.jpg")
    exec(code.replace('weights="DEFAULT"', ""), {})  # the weights would be downloaded


def test_presets_of_the_crf_are_those_of_the_page() -> None:
    for name in CRF_PRESETS:
        crf = CrfConfig.model_validate(name)
        (row,) = re.findall(rf"^\| `{name}` \| (.+) \|$", PAGES["docs/performance.md"], re.MULTILINE)
        _, smoothness, appearance, iterations, _ = row.split(" | ")
        assert smoothness == f"{crf.gaussian_sxy:g}/{crf.gaussian_compat:g}"
        assert appearance == f"{crf.bilateral_sxy:g}/{crf.bilateral_srgb:g}/{crf.bilateral_compat:g}"
        assert iterations == str(crf.iterations)


def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(PROJECT_ROOT / "docs")]
    built = subprocess.run([*command, str(site), "-d", str(tmp_path / "trees")], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {name: network_references(text) for name, text in pages.items() if network_references(text)} == {}
    for name, text in pages.items():
        for address in re.findall(r'<a [^>]*href="([^"#:]+\.html)', text):
            assert (site / name).parent.joinpath(address).resolve().is_file(), f"{name}: {address}"
    assert "smaflib.cams.fuse_cams" in pages["generated/api.html"]
    assert "attention.scales" in pages["generated/settings.html"]
    assert "<math" in pages["generated/tutorial/03_multi_scale_attention.html"]
