"""The parts of ablate.py, in the order in which data flows.

study
    A TOML file -> arms -> trials (arm x seed). All settings are checked here.

scale
    The published shapes and steps of an arm -> those of two cores, by one rule.

runner, ledger
    Trials -> processes -> run folders. Nothing is run twice, nothing is lost, by several machines
    in one folder either.

slurm
    The same as jobs of a Slurm cluster.

records
    What runs leave behind, in folders or in lines, not believed unseen.

statistics
    Scores of seeds -> differences, intervals and verdicts.

report, page
    Run folders -> tables in Markdown, and one HTML page with charts.

sensitivity
    The checkpoint of one run -> what each part of it costs quantised alone.

submission, check
    Run folders -> a leaderboard folder, and what is wrong with one.
"""
