"""Feeds damaged files to the project's readers: `python -m benchmarks.fuzz`.

A *kind* of input is a module with three functions, which `runner.py` calls:

- `prepare(root)` writes undamaged subjects, each a directory `root/subjects/NAME`, and whatever
  they need beside `root/subjects`.
- `damage(root, name, directory, random)` damages a copy of a subject and says how.
- `read(root, name, directory)` reads it with the project's own reader, and returns what it read as
  a string that can be compared. It raises `UserError` or `VideoError` for what is refused, and
  `InvalidResult` if the reader returned what it must not return.
"""
