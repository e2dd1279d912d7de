"""docs/reliability.md has every fault, each injected by tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from reliability import FAULTS, main, page, read_results, suites

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
TESTS = [test for faults in FAULTS.values() for tests in faults.values() for test in tests]
XML = """<testsuites><testsuite>
<testcase classname="tests.test_faults" name="test_a_client_that_answers_twice_counts_once" time="1.25"/>
<testcase classname="tests.test_deployed" time="3"
 name="test_an_upload_whose_link_is_cut_in_the_middle_arrives_whole_or_not_at_all[17 MB]"><skipped/></testcase>
<testcase classname="tests.test_deployed" time="4"
 name="test_an_upload_whose_link_is_cut_in_the_middle_arrives_whole_or_not_at_all[153 MB]"><failure/></testcase>
</testsuite></testsuites>"""


def test_every_fault_has_a_test_that_exists() -> None:
    assert set(TESTS) <= set(suites())


def test_the_page_has_every_fault_and_no_failure() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    told = [[cell.strip("| ") for cell in row[:3]] for row in rows]
    made = [line.split(" | ") for line in page({}).splitlines() if line.startswith("| ")]
    assert told == [[cell.strip("| ") for cell in row[:3]] for row in made]
    assert not [row for row in rows if "failure" in row[3] or "error" in row[3]]


def test_the_page_is_made_from_the_tests_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.xml").write_text(XML)
    text = page(read_results([tmp_path / "results.xml"]))
    assert "| Client answers twice | a client that answers twice counts once | fast | 1 passed | 1.2 |" in text
    assert "arrives whole or not at all | long | 1 skipped, 1 failure | 7.0 |" in text
    assert "| not run | 0.0 |" in text
    main([str(tmp_path / "results.xml")])
    assert capsys.readouterr().out == text
    main(["--tests"])
    assert capsys.readouterr().out.split() == [f"tests/{test}" for test in TESTS]
