"""An ISA object exports only names of its own namespace, runs no code at load time and leaves the x87 unit alone.

Usage: python dev/check_objects.py avx512 build/dev/CMakeFiles/pyengine_core_avx512.dir/csrc/cpu/*.o
"""

import re
import subprocess
import sys
from collections.abc import Iterator


def problems(path: str, isa: str) -> Iterator[str]:
    """One line for each symbol of the object file that breaks a rule."""
    own = f"_ZN2pe{len(isa)}{isa}"  # the mangled prefix of pe::<isa>::
    constants = f"_ZNK2pe{len(isa)}{isa}"
    table = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    for kind, name in (line.split(maxsplit=2)[1:] for line in table.splitlines()):
        if "_GLOBAL__sub_I_" in name:
            yield f"{path}: {name} runs at load time, before any CPU check"
        elif kind in "WVu" and not name.startswith((own, constants)):
            yield f"{path}: {name} is a shared inline copy; the linker may give it to baseline code"
        elif kind.isupper() and not name.startswith((own, constants)):
            yield f"{path}: {name} is exported from outside pe::{isa}"
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    if match := re.search(r".*%mm[0-7].*", code.stdout):
        yield f"{path}: uses an MMX register, which breaks the long doubles of the calling thread: {match[0].strip()}"


if __name__ == "__main__":
    found = [problem for path in sys.argv[2:] for problem in problems(path, sys.argv[1])]
    print("\n".join(found) or "clean")
    sys.exit(bool(found))
