"""A check of pickles before they are unpickled."""

import pickletools
from typing import BinaryIO


def check_memo(file: BinaryIO) -> None:
    """Checks the memo indices of the next pickle of a file, and goes back to its start.

    The standard unpickler allocates as many entries as an index in the file says; a few damaged
    bytes make that gigabytes.

    Raises:
      ValueError: an index is larger than the number of objects before it, or the file is not a
        pickle.
    """
    start = file.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name.endswith("PUT") and argument > number:
            raise ValueError(f"object {argument} of a pickle with {number} so far")
    file.seek(start)
