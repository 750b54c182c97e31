"""Every row of the table of faults in docs/failures.md has its tests, and these are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = {
    "401 or 403, the URL has expired": [
        "fetch/test_refusals.py::test_a_url_that_ends_midway_is_renewed",
        "fetch/test_refusals.py::test_a_listing_that_has_ended_says_when",
    ],
    "401 or 403 otherwise": [
        "fetch/test_refusals.py::test_a_refused_url_is_renewed_once",
        "fetch/test_refusals.py::test_a_refusal_that_stays_is_an_error_at_once",
    ],
    "404, 410 and other refusals": ["fetch/test_faults.py::test_each_fault_has_its_rule"],
    "412, 416; another size, `ETag` (weak ones, too) or date than at first": [
        "fetch/test_faults.py::test_each_fault_has_its_rule",
        "fetch/test_refusals.py::test_another_object_midway_is_an_error_at_once",
        "fetch/test_refusals.py::test_every_range_is_tied_to_the_version",
    ],
    "408, 425, 500, 502, 504": [
        "fetch/test_faults.py::test_each_fault_has_its_rule",
        "fetch/test_refusals.py::test_the_pause_that_the_origin_asks_for",
        "fetch/test_transfer.py::test_a_range_that_never_comes_ends_at_the_deadline",
        "test_retry.py::test_pauses_are_doubled_capped_and_jittered",
    ],
    "429, 503": [
        "fetch/test_faults.py::test_each_fault_has_its_rule",
        "fetch/test_transfer.py::test_a_busy_origin_is_asked_by_fewer",
        "fetch/test_pace.py::test_an_origin_that_is_busy_gets_half",
    ],
    "a proxy refuses the request or a tunnel": [
        "http/test_proxies.py::test_a_tunnel_that_is_refused",
        "http/test_proxies.py::test_a_plain_request_that_the_proxy_refuses",
    ],
    "reset, closed connection, short body": [
        "fetch/test_faults.py::test_each_fault_has_its_rule",
        "fetch/test_snapshot.py::test_a_cut_body_goes_on_where_it_ended",
        "fetch/test_transfer.py::test_what_came_before_a_failure_is_kept_to_the_byte",
    ],
    "no byte, or less than `least_bytes_per_s`, for 2 s, doubled each time that the same is"
    " asked for, up to `stall_timeout_s`; no whole head of an answer within that; no TLS "
    "within `connect_timeout_s`": [
        "fetch/test_snapshot.py::test_a_stall_is_cut",
        "fetch/test_transfer.py::test_next_to_nothing_is_cut",
        "http/test_limits.py::test_an_endless",
        "http/test_limits.py::test_a_handshake_without_an_end",
        "http/test_limits.py::test_every_way_cuts_a_slow_connection",
        "http/test_limits.py::test_more_patience_each_time",
    ],
    "more on a connection than was asked for, such as an answer twice": [
        "http/test_kept.py::test_what_nobody_asked_for_is_no_answer",
        "http/test_kept.py::test_what_comes_to_an_idle_connection",
    ],
    "an answer that is not HTTP, as its RFCs have it": [
        "http/test_grammar.py::test_an_answer",
    ],
    "`Content-Encoding: gzip` or the like": [
        "http/test_codings.py::test_a_coded_file_gets_no_name",
        "http/test_codings.py::test_a_name_that_says_so_is_kept_as_it_is",
        "http/test_codings.py::test_codings_that_mean_nothing",
        "http/test_codings.py::test_a_listing_is_decoded",
    ],
    "no length, and `Range` ignored": [
        "http/test_sizes_told.py::test_no_length_and_no_ranges",
        "http/test_sizes_told.py::test_no_length_and_another_size_in_the_listing",
    ],
    "a connection that is silent for 2 s, or four times slower than the others, "
    "when nothing else is left": [
        "fetch/test_transfer.py::test_what_a_stalled_connection_owes_is_asked_for_elsewhere",
        "fetch/test_transfer.py::test_a_slow_connection_does_not_hold_the_end_back",
        "fetch/test_transfer.py::test_a_slow_connection_that_is_the_last_one_gives_way",
    ],
    "`Range` ignored from the start; neither `ETag` nor date, which would tie ranges together": [
        "fetch/test_refusals.py::test_what_has_no_version_comes_in_one_request",
        "fetch/test_faults.py::test_each_fault_has_its_rule",
        "fetch/test_refusals.py::test_without_ranges_it_starts_over_after_a_break",
        "http/test_sizes_told.py::test_a_body_that_always_ends_early_is_not_asked_for_for_ever",
    ],
    "`Range` ignored later, or other bytes than were asked for": [
        "fetch/test_faults.py::test_each_fault_has_its_rule",
    ],
    "redirect": [
        "fetch/test_faults.py::"
        "test_a_redirect_is_followed_and_the_next_request_asks_the_first_place_again",
        "fetch/test_refusals.py::test_a_circle_of_redirects_is_an_error",
        "http/test_client.py::test_headers_stay_with_their_host",
        "http/test_client.py::test_a_redirect_from_https_to_http",
    ],
    "another size than the listing says": [
        "fetch/test_sizes.py::test_a_page_in_the_place_of_a_file",
        "fetch/test_sizes.py::test_a_listing_that_is_older_than_its_files_is_read_once_more",
    ],
    "bytes that do not sum up to the origin's checksum": [
        "fetch/test_sums.py::test_a_bit_that_turns_over_on_the_way_is_found",
        "stores/test_s3.py::test_an_upload_in_parts_is_proved_by_its_etag",
    ],
    "bytes that do not sum up to an `ETag` of an MD5's form, which some services fill with other "
    "numbers": [
        "fetch/test_guesses.py::test_what_is_no_md5_is_found_out_once",
        "fetch/test_guesses.py::test_where_they_have_fitted_one_that_does_not_refuses",
    ],
    "a broken safetensors file at the origin": [
        "fetch/test_snapshot.py::test_a_broken_safetensors_file_gets_no_name",
    ],
    "disk full, disk error": [
        "fetch/test_disk.py::test_a_disk_that_fills_up_midway",
        "fetch/test_disk.py::test_a_file_that_may_not_become_so_large",
        "fetch/test_faults.py::test_a_disk_that_refuses_stops_it_and_what_is_whole_stays",
    ],
    "a file here that rotted, at the same size": [
        "fetch/test_snapshot.py::test_a_corrupted_file_of_the_same_size_is_found",
        "fetch/test_snapshot.py::test_sampling_sees_the_ends",
    ],
    "another process fetches the same file": [
        "fetch/test_processes.py::test_two_processes_share_the_work",
        "fetch/test_processes.py::test_a_dead_owner_is_succeeded",
    ],
    "SIGTERM, SIGINT, SIGKILL": [
        "fetch/test_processes.py::test_a_signal_ends_it_at_once_and_keeps_what_came",
        "fetch/test_kill.py::test_killed_ten_times",
    ],
}


def test_each_row_has_its_tests() -> None:
    page = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
    table = page.partition("| fault | rule |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ")[0] for line in table.splitlines()]
    assert rows == list(RULES)


@pytest.mark.parametrize("name", sorted({name for names in RULES.values() for name in names}))
def test_the_tests_are_there(name: str) -> None:
    file, _, function = name.partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(", text, re.MULTILINE), name
