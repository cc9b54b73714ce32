"""What the pages say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest

from fastddim.samplers import METHODS
from fastddim.samplers.spacings import SPACINGS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "samplers.md").read_text()


def rows_of(heading: str) -> dict[str, str]:
    """The lines of the table under a heading, by method."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return {name: line for line in section.splitlines() if (name := "".join(re.findall(r"^\| `([\w+]+)` \|", line)))}


def test_the_page_s_code_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    # One block registers a method.
    with mock.patch.dict(METHODS):
        for block in blocks:
            exec(compile(block, "docs/samplers.md", "exec"), names)
        assert "my_euler" in METHODS
    assert names["digits"].shape == (2, 1, 16, 16)


@pytest.mark.slow
def test_the_code_of_the_page_on_hoisting_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "hoisting.md").read_text(), re.DOTALL):
        exec(compile(block, "docs/hoisting.md", "exec"), names)
    nbytes, record = capsys.readouterr().out.splitlines()
    assert names["digits"].shape == (4, 1, 16, 16)
    # 20 steps of four samples; the file's values are the same.
    assert names["state"].shape == (2, 1, 16, 16)
    assert int(nbytes) == 20 * (eval(record)["bytes_per_step"] + 4 * eval(record)["bytes_per_step_and_sample"])


@pytest.mark.parametrize("name", METHODS)
def test_the_page_has_each_method_with_its_classes_and_options(name: str) -> None:
    method = METHODS[name]
    said = re.findall(r"`(\w+Scheduler)`", rows_of("Which one")[name])
    # DDPM's and PNDM's classes are named in the text; other variants and inverses are not.
    assert set(said) <= set(method.schedulers) and bool(said) == bool(method.schedulers)
    assert all(each in PAGE for each in method.schedulers if not re.search("Parallel|Inverse|PNDM", each))
    given = re.findall(r"`(\w+)=([^`]+)`", rows_of("Options")[name])
    read = {option: eval(value, {"inf": float("inf")}) for option, value in given}
    assert read == method.options


def test_the_page_has_each_spacing() -> None:
    assert all(f'`"{name}"`' in PAGE for name in SPACINGS)


def test_links_lead_somewhere() -> None:
    for page, heading in re.findall(r"\]\((\w+\.md)#?([\w-]*)\)", PAGE):
        lines = (DOCS / page).read_text().splitlines()
        slugs = {
            re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in lines if line[:1] == "#"
        }
        assert not heading or heading in slugs
