"""The parts of train_gpt.py --plan, in the order in which data flow: a run, before it is run.

flops      FLOPs of a model's shapes; bench.py uses them too
machines   what cards can do, by their data sheets
memory     the most bytes that a rank holds
text       the shards that are there, or what is known of the published ones

forecast   settings, machine -> everything, as one dict
screen     that dict as one screen
command    the options, and the exit code
"""
