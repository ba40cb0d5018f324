"""The codemod behind ``bmt-convert``: turns ordinary torch projects into bmtrain projects.

``ast`` and facts about the whole project find what to change; libcst changes it. Layers, imports only downwards::

    cli | command          the command line | the same conversion as a libcst.codemod command
    formats | output       reports for machines: json, markdown, sarif | writes all results, or nothing
    portions | verify      large projects by portions | shows that the converted model is the original
    docs                   the rules as markdown
    convert | report       files in, results out | results as text and diffs
    rewrite                the bytes of a file after its plan, or the error that leaves it as it was
    transform              one libcst transformer a file makes all its changes
    link | write           pairs ast nodes with libcst's | libcst nodes from templates
    plan                   facts -> the changes a file gets and the findings to report; pure
    rules/                 one rewrite a file, and none knows another
        ordinary/          scripts of other engines that are ordinary loops with other names: first of all
        model/             base classes, parameters, lists of blocks and the loops over them
        training/          starting, data, losses, optimizers, output, checkpoints
        refusals/          what cannot be converted, and what the user should look at
    analyze/               reads a project, never changes it; ``facts`` is what rules ask
        model/ | training/ what modules are made of | what scripts do with them
        read/              files, names, classes
    config | discover      settings in pyproject.toml | which files are a project's own
    types                  frozen values: conversions, remarks, refusals, results
    changes                what rules say: printable, without offsets and without libcst
    progress | spelling    a line on the terminal | the nearest of known names
"""

__version__ = "2.0.0.dev0"
