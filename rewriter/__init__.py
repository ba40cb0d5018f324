"""The codemod behind ``bmt-convert``: turns ordinary torch projects into bmtrain projects.

Layers, imports only downwards::

    types       frozen values: spans, edits, findings
    analyze/    reads source, never changes it
    rules/      one rewrite a file
    plan        findings -> the edits to apply and the findings to report
    transform   applies edits to source
    report      text, diff, json, markdown, sarif
    convert     files in, results out
    cli         the command line
"""
