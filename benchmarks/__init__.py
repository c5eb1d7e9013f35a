"""The parts of bench.py, in the order in which data flows.

twins           the plainest code that computes the same
machine         rates of this machine, their floors, the stop-watch
training        stages before and during training
after_training  stages of scoring, export, data
measure         all stages -> a report

pauses          a checkpoint beside the steps, what a rank reads; a command of its own
peers           public scripts and ours -> a report of another kind
report          the tables of a report of either kind
"""
