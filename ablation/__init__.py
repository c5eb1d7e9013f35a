"""The parts of ablate.py, in the order in which data flows.

study        a TOML file -> arms -> trials (arm x seed), all settings checked before anything starts
runner       trials -> processes -> run folders; nothing is run twice, nothing is lost
records      what runs leave behind, as read from a disk and not believed unseen
statistics   scores of seeds -> differences, intervals, verdicts
report       run folders -> tables and Markdown
page         the same, with charts, as one HTML page
submission   run folders -> a leaderboard folder, and its check
"""
