"""What happens when something goes wrong: the rows of the table in docs/faults.md."""

from typing import NamedTuple

from ablation.report import markdown_table


class Fault(NamedTuple):
    """One row. code: the exit code as printed. tests: file -> tests, without test_ before them."""

    what: str
    seen: str
    code: str
    kept: str
    tests: dict[str, tuple[str, ...]]


FAULTS = [
    Fault(
        "the pod dies, `kill -9`, at any moment",
        "nothing; `RESUME=1` with the same `RUN_ID` goes on",
        "137",
        "all up to the last checkpoint (every `CHECKPOINT_EVERY` seconds, and after training)",
        {
            "test_faults": ("after_kill_9_at_any_moment_the_run_goes_on_to_the_same_end",),
        },
    ),
    Fault(
        "SIGTERM or Ctrl-C while training",
        "the step under way is finished on all ranks, then `saved after N steps`",
        "143, 130",
        "every step",
        {
            "test_resume": (
                "a_resumed_run_equals_the_uninterrupted_one_bit_for_bit",
                "a_signal_to_one_rank_stops_all_after_the_same_step",
            ),
            "test_pipeline": ("a_signal_ends_the_run_with_its_exit_code_and_one_line",),
        },
    ),
    Fault(
        "SIGTERM or Ctrl-C after training",
        "one line with the phase",
        "143, 130",
        "the training; `RESUME=1` exports and scores",
        {
            "test_resume": (
                "a_run_stopped_after_training_exports_and_scores_without_training_again",
            ),
        },
    ),
    Fault(
        "the newest checkpoint is torn or damaged",
        "`WARNING ... the one before it is used`",
        "0",
        "the checkpoint before it; the damaged one as `checkpoint.damaged`",
        {
            "test_resume": (
                "a_damaged_checkpoint_is_recognised_and_the_one_before_it_used_loudly",
                "what_is_no_damage_leaves_the_checkpoints_as_they_are",
            ),
        },
    ),
    Fault(
        "both are",
        "`no checkpoint ... is whole`",
        "2",
        "everything as it lies there",
        {
            "test_resume": (
                "without_a_whole_checkpoint_the_run_is_refused_and_nothing_is_touched",
            ),
        },
    ),
    Fault(
        "`RESUME=1` with other training settings, or another script",
        "the setting with both values, or the path of the right script",
        "2",
        "everything",
        {
            "test_resume": (
                "another_training_setting_is_refused_with_both_values",
                "another_script_is_refused_and_the_one_that_began_is_kept",
            ),
        },
    ),
    Fault(
        "`RESUME=1` of a complete run",
        "`nothing is left to do`",
        "that of the run",
        "everything",
        {
            "test_resume": ("a_complete_run_is_left_alone_and_keeps_its_exit_code",),
        },
    ),
    Fault(
        "a mistyped setting, or one of other scripts that is missing here",
        "each by name with what was meant, all at once; under torchrun as its last words, too",
        "2",
        "nothing was begun, and `RUN_ID` stays free",
        {
            "test_launch": (
                "an_argument_that_is_no_setting_is_refused_whatever_it_looks_like",
                "what_is_wrong_is_the_last_thing_that_torchrun_shows",
                "a_refused_launch_leaves_its_name_free",
            ),
            "test_config": ("no_variable_of_a_published_command_is_ignored_in_silence",),
        },
    ),
    Fault(
        "`RUN_ID` is taken",
        "the folder, `RESUME=1`, and a name that is free",
        "2",
        "everything",
        {
            "test_launch": ("a_run_id_that_is_taken_is_refused_with_both_remedies",),
        },
    ),
    Fault(
        "whoever reads the output ends (`| head -3`)",
        "nothing; `train.log` goes on",
        "0",
        "everything",
        {
            "test_launch": ("a_run_whose_output_nobody_reads_goes_on_to_its_end",),
        },
    ),
    Fault(
        "a second process works on the same run",
        "`another process is at work there`",
        "2",
        "everything; the first goes on",
        {
            "test_resume": ("two_processes_never_work_on_one_run",),
        },
    ),
    Fault(
        "one rank is killed",
        "`lost rank N in phase '...'` from each other rank, about 5 s later",
        "6",
        "up to the last checkpoint",
        {
            "test_faults": ("when_one_rank_is_killed_the_others_name_it_and_stop",),
        },
    ),
    Fault(
        "a host is lost, or the link to it",
        "the same, after `DIST_TIMEOUT` and some 10 s",
        "6",
        "up to the last checkpoint; `RESUME=1` on the hosts that are left",
        {
            "test_hosts": (
                "a_link_that_loses_all_packets_ends_both_hosts_in_time_and_the_run_goes_on_once_mended",
                "a_killed_host_ends_the_other_in_time_and_the_run_goes_on_with_what_is_left",
            ),
        },
    ),
    Fault(
        "the ranks' weights drift apart",
        "`the ranks hold different weights`, at the next line of the log or checkpoint",
        "6",
        "the last checkpoint before",
        {
            "test_faults": ("ranks_that_drift_apart_are_noticed_before_the_next_checkpoint",),
        },
    ),
    Fault(
        "disk full at the start of training",
        "file and `No space left on device`, before a step is made",
        "7",
        "everything",
        {
            "test_faults": ("a_full_disk_is_one_line_and_costs_nothing_that_was_finished",),
        },
    ),
    Fault(
        "disk full while training",
        "the same, at the next line of the log or checkpoint",
        "7",
        "up to the last checkpoint",
        {
            "test_faults": (
                "a_disk_that_fills_up_while_training_leaves_the_last_checkpoint",
                "a_log_that_cannot_be_written_is_one_line",
            ),
        },
    ),
    Fault(
        "disk full at artifact.bin or result.json",
        "the same",
        "7",
        "the training; `RESUME=1` exports and scores",
        {
            "test_faults": ("a_full_disk_is_one_line_and_costs_nothing_that_was_finished",),
        },
    ),
    Fault(
        "LOGS_DIR cannot be written",
        "`cannot create`",
        "2",
        "everything",
        {
            "test_faults": ("a_log_folder_that_cannot_be_made_is_refused",),
        },
    ),
    Fault(
        "a shard is deleted, cut, overwritten (2) or cannot be read (7) while training",
        "the shard and what is wrong with it, once, though it be in the rows of one rank alone",
        "2, 7",
        "every step: all ranks stop before the same one, then `saved after N steps`",
        {
            "test_faults": (
                "a_shard_that_changes_while_training_stops_the_run_and_loses_no_step",
                "a_bad_token_of_one_rank_stops_all_ranks_before_that_step",
                "a_disk_that_fails_for_one_rank_is_one_line_of_all",
            ),
        },
    ),
    Fault(
        "a shard with wrong magic or length, or a token beyond the vocabulary",
        "the shard and what is wrong with it",
        "2",
        "nothing was begun",
        {
            "test_data": (
                "a_damaged_shard_is_refused_with_file_and_remedy",
                "a_token_outside_the_vocabulary_is_refused_with_file_and_id",
            ),
        },
    ),
    Fault(
        "validation split empty, or without text",
        "`0 tokens`, `0 bytes of text`",
        "2",
        "nothing was begun",
        {
            "test_faults": (
                "an_empty_or_tiny_validation_split_is_refused_before_anything_is_trained",
            ),
        },
    ),
    Fault(
        "NaN or Inf in loss or gradients",
        "step, tensor and remedy, then `saved after N steps`",
        "5",
        "the state before that step; `NONFINITE=skip` goes on without it, 9 times in a row at most",
        {
            "test_faults": (
                "nan_or_inf_stops_before_it_reaches_the_weights",
                "weights_that_are_not_finite_are_never_saved_and_the_log_says_so",
                "a_periodic_checkpoint_that_was_not_written_is_told",
                "a_skipped_step_leaves_weights_moments_and_averages_alone",
                "a_run_of_nothing_but_nan_stops_although_steps_may_be_skipped",
            ),
        },
    ),
    Fault(
        "out of memory",
        "phase and knob to turn",
        "8",
        "up to the last checkpoint",
        {
            "test_faults": ("out_of_memory_names_the_phase_and_the_knob",),
        },
    ),
    Fault(
        "the clock jumps, the machine sleeps",
        "nothing; budgets follow a monotonic clock",
        "0",
        "everything",
        {
            "test_faults": (
                "a_wall_clock_that_jumps_changes_nothing",
                "a_machine_that_slept_ends_the_run_in_good_order",
            ),
        },
    ),
    Fault(
        "more ranks than rows in a step",
        "`fewer rows than N ranks`",
        "2",
        "nothing was begun",
        {
            "test_faults": ("more_ranks_than_rows_are_refused_on_every_rank",),
        },
    ),
    Fault(
        "weights become too large for fp16",
        "tensor, largest weight and the learning rate to lower, before `artifact.bin` is written",
        "5",
        "the training, in `checkpoint.bin`",
        {"test_export": ("weights_beyond_fp16_end_the_run_before_an_artifact_is_written",)},
    ),
    Fault(
        "training or scoring takes longer than its limit",
        "`OVER THE LIMIT: train took ... too long`, and the slack in the time ledger",
        "9",
        "everything",
        {
            "test_ledger": (
                "training_over_its_limit_is_not_good",
                "scoring_is_held_to_the_limit_where_the_contest_holds_it",
            ),
            "test_faults": ("a_machine_that_slept_ends_the_run_in_good_order",),
        },
    ),
    Fault(
        "an artifact or checkpoint that is damaged, forged or huge",
        "`not one of our files, or damaged`",
        "2",
        "everything",
        {
            "test_export": (
                "a_flipped_bit_anywhere_is_refused",
                "a_decompression_bomb_is_refused_in_little_memory",
                "a_hostile_configuration_is_refused",
            ),
        },
    ),
]


def fault_tests() -> list[tuple[str, str]]:
    """(file, test function) of every row."""
    found = []
    for fault in FAULTS:
        for file, names in fault.tests.items():
            found += [(file, f"test_{name}") for name in names]
    return found


def faults() -> str:
    rows = []
    for fault in FAULTS:
        shown = []
        for file, names in fault.tests.items():
            shown.append(f"{file}: " + ", ".join(f"`{name}`" for name in names))
        rows.append([fault.what, fault.seen, fault.code, fault.kept, "\n".join(shown)])
    header = ["what happens when", "what you see", "exit code", "what is kept", "shown by tests/"]
    return markdown_table(header, rows)
