"""Proof of a whole script: the user's own command, run as it is and converted, compared event by event.

Layers, imports only downwards::

    digests     short numbers that stand for tensors, samples and generators' states
    record      one process: hooks that write down what a script does, then the script
    host        a process that has loaded torch once; every run is a fork of it
    text        lines whose numbers are compared as numbers
    runs        starts runs, watches them, notices when they stall
    files       what runs left behind, compared by kind
    story       what a run's events say, loss by loss
    split       whether a loss looks across the items of a batch
    compare     two runs, and the class of what differs
    prove       the whole proof
    report      text, json and markdown
    command_line  what bmt-convert calls
"""
