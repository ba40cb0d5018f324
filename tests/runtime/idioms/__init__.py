"""What users write around a model: each idiom once, run by plain torch on one process and sharded on 1, 2 and 3 ranks.

``registry`` says what an idiom is, ``user`` what conversion changes in one, ``verdicts`` how it came out.  The other
modules hold the idioms, by theme.  ``python -m idioms`` writes the table, docs/idioms.md.
"""
