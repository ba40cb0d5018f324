"""Proof that a converted model is the original model.

Runs both in processes of their own, the converted one on several ranks, and compares everything training depends on.
The only package of the rewriter that imports torch; bmtrain is imported by the converted side's processes alone.

Layers, imports only downwards::

    tree        tensors in any nesting of outputs
    compare     distances between two recordings
    findings    rows of distances, and whether they are a proof
    dropout     dropout that does nothing
    inputs      what the factory gave, or inputs made up from forward's annotations
    sides       how the original and the converted model train
    phases      what is recorded
    worker      one process that records
    processes   starts workers and talks to them
    run         the whole comparison
    report      table and json

``script`` does for a whole script what these do for a model.
"""
