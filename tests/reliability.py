"""docs/reliability.md: the faults and attacks that the tests inject, and what came out of them.

    python tests/reliability.py --tests         the tests' names, for pytest
    python tests/reliability.py RESULTS.xml     the page, from what pytest --junitxml has written

A row is a fault; its outcome is the name of the test that injects it, and its result that of the run in the file. Of a
test that is in several files, the last result is taken.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent

FAULTS: dict[str, dict[str, list[str]]] = {
    "Clients and links": {
        "Client process killed while it trains; SuperNode restarted; link cut for good": [
            "test_deployed.py::test_a_client_killed_while_it_trains_and_one_that_never_answers_are_left_out"
        ],
        "Client does not answer": [
            "test_server.py::test_who_does_not_answer_in_time_is_told_and_left_out",
            "test_strategy.py::test_clients_are_not_waited_for_without_an_end",
        ],
        "Client raises an error": ["test_strategy.py::test_a_client_that_raises_does_not_stop_the_round"],
        "Client answers after the deadline": [
            "test_faults.py::test_an_answer_after_the_deadline_is_not_waited_for_and_does_not_disturb_the_next_round"
        ],
        "Client answers twice": [
            "test_faults.py::test_a_client_that_answers_twice_counts_once",
            "test_strategy.py::test_of_two_answers_for_one_client_the_one_of_the_lowest_node_is_kept",
        ],
        "Client answers for another round": ["test_faults.py::test_an_answer_for_another_round_is_left_out"],
        "Client answers with another model": ["test_faults.py::test_an_answer_with_another_model_is_refused_by_name"],
        "Link cut in the middle of an upload": [
            "test_deployed.py::test_an_upload_whose_link_is_cut_in_the_middle_arrives_whole_or_not_at_all"
        ],
        "Too few clients are left": ["test_strategy.py::test_too_few_good_updates_fail_the_round_with_every_reason"],
        "Clients come and go, round after round": [
            "test_soak.py::test_rounds_with_clients_that_come_and_go_leave_nothing_behind"
        ],
    },
    "Server and disk": {
        "SuperLink killed before the merge": [
            "test_deployed.py::test_a_superlink_killed_before_the_merge_goes_on_with_what_has_arrived"
        ],
        "SuperLink killed during and after the merge": [
            "test_deployed.py::test_a_superlink_killed_during_and_after_the_merge_ends_in_the_same_bits"
        ],
        "SuperExec dies": [
            "test_deployed.py::test_a_superexec_that_died_is_started_again_and_runs_do_not_wait_for_ever"
        ],
        "Server dies in any round": [
            "test_faults.py::test_a_run_that_is_submitted_again_goes_on_where_its_server_died",
            "test_faults.py::test_what_sites_sent_before_they_went_away_is_merged",
            "test_faults.py::test_what_arrived_before_the_server_died_is_merged_without_any_site",
        ],
        "kill -9 in the middle of NP Merge": [
            "test_interrupted.py::test_a_server_killed_in_the_middle_of_np_merge_resumes_to_the_same_bits"
        ],
        "Disk full, quota, input and output errors": [
            "test_interrupted.py::test_a_full_disk_is_told_and_leaves_every_file_whole",
            "test_interrupted.py::test_an_error_when_the_disk_is_flushed_is_one_too",
        ],
        "Two runs in one folder": [
            "test_interrupted.py::test_a_second_command_in_a_folder_is_refused_while_the_first_one_runs",
            "test_interrupted.py::test_of_two_processes_that_make_a_run_in_one_folder_one_does",
            "test_faults.py::test_of_two_runs_that_enter_one_folder_one_goes_on",
        ],
        "Damaged run folder": [
            "test_fuzzing.py::test_a_run_folder_with_a_mutated_file_is_read_or_refused",
            "test_fuzzing.py::test_a_damaged_update_is_told_with_what_to_do",
        ],
    },
    "Fetching and keys": {
        "File changes while it is fetched": ["test_deploy.py::test_a_file_that_changes_on_its_way_is_refused"],
        "Server lies about names, or breaks off": [
            "test_deploy.py::test_a_server_that_lies_or_breaks_off_writes_nothing",
            "test_deploy.py::test_an_archive_with_links_or_other_names_is_refused",
        ],
        "Run fails behind Flower's exit code 0": ["test_deploy.py::test_a_run_that_does_not_complete_is_an_error"],
        "Another server's certificate": [
            "test_certificates.py::test_another_name_and_another_authority_are_not_trusted"
        ],
        "Keys that others could read": [
            "test_certificates.py::test_private_files_are_their_owners_alone",
            "test_certificates.py::test_a_folder_that_others_can_enter_is_refused",
        ],
    },
    "Hostile updates": {
        "NaN, infinities, wrong shapes, dtypes, keys": [
            "test_wire.py::test_a_malformed_array_is_refused_with_the_reason",
            "test_wire.py::test_a_malformed_record_is_refused_with_the_reason",
        ],
        "Huge tensors": [
            "test_fuzzing.py::test_an_array_that_promises_much_costs_no_memory",
            "test_fuzzing.py::test_a_header_that_promises_much_costs_no_memory",
        ],
        "10,000 mutated files and replies": [
            "test_fuzzing.py::test_ten_thousand_mutated_checkpoints_are_read_or_refused_in_little_memory",
            "test_fuzzing.py::test_ten_thousand_replies_are_updates_or_refused",
        ],
        "Flipped labels and signs, noise, zeros, copies, exploding weights": [
            "test_screening.py::test_the_hostile_are_left_out_with_the_reason_and_the_honest_stay"
        ],
        "False label counts": [
            "test_screening.py::test_a_claim_to_know_everything_makes_nobody_the_judge_of_all",
            "test_screening.py::test_a_client_is_judged_on_the_classes_that_it_claims_alone",
        ],
        "Writing outside the run folder": [
            "test_fuzzing.py::test_nothing_is_written_outside_the_run_folder",
            "test_fuzzing.py::test_a_link_out_of_the_run_folder_is_not_written_through",
        ],
        "Pickle": ["test_fuzzing.py::test_nothing_is_unpickled"],
    },
}

TABLE = ("| Fault | What was asserted | Suite | Result | Seconds |", "| --- | --- | --- | --- | ---: |")

HEAD = """# Reliability

Faults and attacks, each injected by tests, and what comes out: a test's name is what it has asserted. `.ci/slow` makes
this page from the results of the tests that it has run. *fast* tests run with `pytest`, *slow* ones in `.ci/run`, and
*long* ones in `.ci/slow`. Where a test has several cases, the result counts them, and the seconds are those of all."""


def suites() -> dict[str, str]:
    """Return the suite of each test function, FILE::NAME."""
    found = {}
    for path in sorted(TESTS.glob("test_*.py")):
        for item in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                marks = " ".join(map(ast.unparse, item.decorator_list))
                kinds = [kind for kind in ("slow", "long") if f"mark.{kind}" in marks]
                found[f"{path.name}::{item.name}"] = ", ".join(kinds) or "fast"
    return found


def read_results(paths: Iterable[Path]) -> dict[str, dict[str, tuple[str, float]]]:
    """Return for each test function its cases' outcomes and seconds."""
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for path in paths:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            name = case.attrib["name"]
            test = f"{case.attrib['classname'].rpartition('.')[2]}.py::{name.partition('[')[0]}"
            kinds = {child.tag for child in case}
            outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
            found.setdefault(test, {})[name] = outcome, float(case.attrib["time"])
    return found


def page(results: Mapping[str, Mapping[str, tuple[str, float]]]) -> str:
    """Return the page, in Markdown."""
    lines, kinds = [HEAD], suites()
    for title, faults in FAULTS.items():
        lines += ["", f"## {title}", "", *TABLE]
        for fault, tests in faults.items():
            for index, test in enumerate(tests):
                cases = results.get(test, {})
                text = test.partition("::test_")[2].replace("_", " ")
                outcomes = [outcome for outcome, _ in cases.values()]
                counts = {kind: outcomes.count(kind) for kind in dict.fromkeys(outcomes)}
                told = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "not run"
                seconds = sum(time for _, time in cases.values())
                lines.append(f"| {'' if index else fault} | {text} | {kinds[test]} | {told} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> None:
    """Write the page, or the names of its tests."""
    if words == ["--tests"]:
        tests = [test for faults in FAULTS.values() for names in faults.values() for test in names]
        sys.stdout.write("".join(f"tests/{test}\n" for test in tests))
    else:
        sys.stdout.write(page(read_results(map(Path, words))))


if __name__ == "__main__":
    main(sys.argv[1:])
