"""One module for each command of `t5patches`, in the order in which `--help` lists them.

A module `t5patches/commands/NAME.py` has

* a docstring: its first line is the command's line in `t5patches --help`, the rest (or all of it)
  the text above the options in `t5patches NAME --help`;
* `add_arguments(parser)`, which adds the command's own options;
* `run(options)`, which returns the exit code. It imports what is slow to import (JAX) itself, so
  that `--help` and wrong arguments do not wait for it. What is wrong with files or data is raised
  as `ValueError` or `NotImplementedError`; `t5patches.cli` says it and exits with 2.

It may have `AGAIN`, which says how to go on after an interruption (default: repeat the command),
and `LESS_MEMORY`, which says what to change where memory runs out.

`--quiet` and `--json` are added to every command; `common` has what they mean.
"""

NAMES = ("demo", "annotate", "edit", "reward", "align", "evaluate", "convert")
